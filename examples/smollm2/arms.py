"""The loop over the arms of a run: the same steps of each, its checkpoints, its progress, and Ctrl-C."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from examples.smollm2 import report, run_folder, text


class Arm(NamedTuple):
    """One way to train, from the first step to the last."""

    take: Callable[[Any, int, Any], tuple[Any, dict[str, Any]]]  # (state, step, batch) -> (state, metrics)
    fresh_state: Callable[[], Any]  # before the first step
    evaluate: Callable[[Any], dict[str, Any]]  # params -> scores on held-out text
    seed: int  # of the order of its batches


def train(arms, job, run, settings, console):
    """Train each of ``arms`` (by their names) in turn; False when Ctrl-C ended it before its end.

    ``run`` is the open folder: one that holds checkpoints goes on after the newest.
    """
    checkpoints, log, is_new, position = run
    steps, end = settings.steps, settings.steps * len(arms)
    lines = report.LinesNowAndThen(console)
    if not is_new:
        console.print(f"going on after step {position} of {end}")
    with stop_on_interrupt() as stop, report.progress_bar(console) as bar:
        for arm_index, (name, arm) in enumerate(arms.items()):
            arm_start = arm_index * steps
            if position >= arm_start + steps:
                continue
            state = arm.fresh_state()
            if position > arm_start:
                state = run_folder.restore(checkpoints, position, state)
            lines.say(f"{name}: the first step compiles", at_once=True)
            task = bar.add_task(name, total=steps, completed=position - arm_start, note="compiling")
            steps_left = range(position - arm_start + 1, steps + 1)
            batches = job.source.batches(
                job.num_held_out + text.batch_indices(arm.seed, step - 1, settings.batch_size, job.num_train)
                for step in steps_left
            )
            for step in steps_left:
                step_began = time.perf_counter()
                state, metrics = arm.take(state, step, next(batches))
                loss = float(metrics["loss"])
                speed = settings.batch_size * settings.seq_len / (time.perf_counter() - step_began)
                position = arm_start + step
                log.write("train", position, model=name, step=step, tokens_per_second=speed, **metrics)
                note = f"loss {loss:.3f}, {speed:.0f} tokens/s"
                bar.update(task, completed=step, note=note)
                lines.say(f"{name}, step {step} of {steps}: {note}")

                if step % settings.eval_every == 0 or step == steps:
                    scores = arm.evaluate(state["params"])
                    log.write("held_out", position, model=name, step=step, **scores)
                    bar.console.print(f"{name}, step {step}: {report.one_line(scores)}")
                if step % settings.checkpoint_every == 0 or step == steps or stop.is_set():
                    run_folder.save(checkpoints, position, state)
                if stop.is_set() and position < end:
                    bar.stop()
                    console.print(f"stopped after step {position} of {end}: add --resume to the command to go on")
                    return False
    return True


@contextlib.contextmanager
def stop_on_interrupt():
    """An event that the first Ctrl-C sets, so that the step in hand is finished and saved; the second one kills."""
    stop = threading.Event()

    def handle(*_):
        stop.set()
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)
