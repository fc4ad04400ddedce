"""What the commands share before training begins: a device, errors of one line, the teacher and the text made ready."""

from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
from rich.console import Console

from examples.smollm2 import flags, report, run_folder, teacher, text
from torch_bridge import TeacherBatch
from torch_bridge.teachers import model_fingerprint


class SettingsError(Exception):
    """A flag does not fit the machine, the teacher or the text; the message says which."""


def launch(run, settings):
    """The exit status of ``run(settings, device, console)``; what a user can mend becomes one line."""
    console = Console()
    try:
        device = choose_device(settings.device)
        with jax.default_device(jax.devices(device)[0]):
            return run(settings, device, console)
    except (SettingsError, teacher.TeacherError, run_folder.RunFolderError) as error:
        console.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("stopped: run the same command again, with --resume if training had begun")
        return 130


class Job(NamedTuple):
    """What training needs of the teacher and the text."""

    source: Any  # its batches(indices) are `TeacherBatch`, of the windows held out and then those to train on
    held_out: TeacherBatch
    num_train: int
    dtype: str
    identity: dict[str, Any]  # what a run must keep to be resumed

    @property
    def num_held_out(self):
        return len(self.held_out.tokens)


def prepare(settings, device, console):
    """Open the teacher, which is PyTorch's, and have it read the text: the model, and a `Job` without its logits."""
    folder = settings.out
    dtype = settings.dtype or ("bfloat16" if device == "gpu" else "float32")
    identity = flags.lasting(settings) | {"dtype": dtype}
    run_folder.check(folder, identity, resume=settings.resume)
    with report.busy(console, "opening the teacher"):
        torch_model, tokenizer = teacher.open_teacher(
            settings.teacher,
            settings.cache,
            dtype=getattr(torch, dtype),
            device="cuda" if device == "gpu" else "cpu",
            say=console.print,
        )
    parts = split_text(settings, tokenizer, torch_model.config)
    teacher_name = model_fingerprint(torch_model)
    identity |= {"teacher_sha256": teacher_name, "text_sha256": text.fingerprint(*parts)}
    run_folder.check(folder, identity, resume=settings.resume)
    windows, num_held_out, num_train = np.concatenate(parts), *map(len, parts)
    if settings.live_teacher:
        source = teacher.Live(torch_model, windows)
    else:
        progress = partial(report.tracked, description="the teacher reads", console=console)
        source = teacher.cached(
            torch_model, tokenizer, windows, settings.cache, name=teacher_name, dtype=dtype, progress=progress
        )
    (held_out,) = source.batches([np.arange(num_held_out)])
    console.print(f"{held_out.tokens.size} tokens held out, {num_train * settings.seq_len} to train on")
    return torch_model, Job(source, held_out, num_train, dtype, identity)


def choose_device(wanted):
    """The name of a JAX platform: the GPU where both frameworks have one, unless told otherwise."""
    both = jax.default_backend() == "gpu" and torch.cuda.is_available()
    if wanted == "gpu" and not both:
        raise SettingsError("--device gpu: JAX and PyTorch must both see a CUDA GPU here, and one does not")
    return wanted or ("gpu" if both else "cpu")


def split_text(settings, tokenizer, config):
    """The windows held out and those to train on, (N, seq_len + 1) tokens each."""
    layers = np.max(settings.student_layers)
    if layers > config.num_hidden_layers:
        raise SettingsError(f"--student-layers {layers}: the teacher has {config.num_hidden_layers}")
    tokens = tokenizer(text.read_text(settings.text), add_special_tokens=False, verbose=False)["input_ids"]
    windows = text.windows_of(tokens, settings.seq_len)
    if len(windows) < settings.held_out_windows + settings.batch_size:
        raise SettingsError(
            f"the text has {len(windows)} windows of {settings.seq_len} tokens, too few for --held-out-windows "
            f"{settings.held_out_windows} and --batch-size {settings.batch_size}: give more --text or smaller values"
        )
    train = min(settings.train_windows, settings.steps * settings.batch_size)
    return text.split(windows, settings.held_out_windows, train, settings.seed)
