"""The folder of a run: its settings, its log, its checkpoints. What is on disk is whole at any moment."""

import json
from typing import NamedTuple

import orbax.checkpoint as ocp

from examples.smollm2.teacher import written_whole


class RunFolderError(Exception):
    """The folder holds a run that is not to be touched; the message says why."""


def check(folder, settings, *, resume):
    """Refuse a folder that holds a run already, unless it is to be resumed and ``settings`` are what it began with."""
    path = folder / "settings.json"
    if not path.exists():
        return
    began = json.loads(path.read_text())
    changed = {key: value for key, value in settings.items() if began.get(key) != value}
    if changed:
        differences = "; ".join(f"{key} was {began.get(key)!r}, now {value!r}" for key, value in changed.items())
        raise RunFolderError(f"{folder} holds another run ({differences}): choose another --out")
    if not resume:
        raise RunFolderError(f"{folder} holds a run with these settings: pass --resume to go on, or another --out")


def claim(folder, settings):
    """Begin a run in ``folder``, or go on with the one that `check` let pass."""
    folder.mkdir(parents=True, exist_ok=True)
    with written_whole(folder / "settings.json") as partial:
        partial.write_text(json.dumps(settings, indent=2) + "\n")


class Log:
    """A JSON-lines file. Each record has a kind and a position, the steps done in the run when it was written.

    Records are flushed before the checkpoint of their position is written. Opened up to that position, the file holds
    each of them once, whatever happened after the checkpoint.
    """

    def __init__(self, path, *, upto):
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = (json.loads(line) for line in lines if line.endswith("\n"))  # a kill may cut the last line short
        self.records = [record for record in whole if record["position"] <= upto]
        with written_whole(path) as partial:
            partial.write_text("".join(json.dumps(record) + "\n" for record in self.records))
        self.path = path

    def write(self, kind, position, **values):
        plain = {key: value if isinstance(value, str | int) else float(value) for key, value in values.items()}
        self.records.append({"kind": kind, "position": position, **plain})
        with self.path.open("a") as file:
            file.write(json.dumps(self.records[-1]) + "\n")

    def of(self, kind):
        return [record for record in self.records if record["kind"] == kind]

    def held_out(self, model):
        """The scores of a model on held-out text, in order."""
        return [record for record in self.of("held_out") if record["model"] == model]


class Run(NamedTuple):
    """An open folder, and where in it a run begins or goes on."""

    checkpoints: ocp.CheckpointManager
    log: Log
    is_new: bool
    position: int  # steps done, over all arms


def begin(folder, settings):
    """`claim` the folder and open what is in it."""
    claim(folder, settings)
    checkpoints = open_checkpoints(folder / "checkpoints")
    position = checkpoints.latest_step()
    is_new = position is None
    return Run(checkpoints, Log(folder / "log.jsonl", upto=-1 if is_new else position), is_new, position or 0)


def open_checkpoints(folder):
    """An orbax manager of the newest checkpoint. Saving waits: the state's buffers are donated to the next step."""
    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
    return ocp.CheckpointManager(folder.absolute(), options=options)


def restore(checkpoints, position, template):
    """The state saved at ``position``, shaped like ``template``."""
    return checkpoints.restore(position, args=ocp.args.StandardRestore(template))


def save(checkpoints, position, state):
    checkpoints.save(position, args=ocp.args.StandardSave(state))
