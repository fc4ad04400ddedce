"""The loop over the arms of a run: the same steps of each, its checkpoints, its progress, and Ctrl-C."""

import contextlib
import signal
import threading
import time

from examples.smollm2 import report, run_folder, text


def train(arms, fresh_state, evaluate, job, run, settings, console):
    """Train each arm from ``fresh_state()`` on the same batches; False when Ctrl-C ended it before its end.

    ``arms`` maps a name to ``take(state, step, batch) -> (state, metrics)``; ``evaluate(params)`` gives the scores on
    held-out text. ``run`` is the open folder: one that holds checkpoints goes on after the newest.
    """
    checkpoints, log, is_new, position = run
    steps, end = settings.steps, settings.steps * len(arms)
    if not is_new:
        console.print(f"going on after step {position} of {end}")
    with stop_on_interrupt() as stop, report.progress_bar(console) as bar:
        for arm_index, (arm, take) in enumerate(arms.items()):
            arm_start = arm_index * steps
            if position >= arm_start + steps:
                continue
            state = fresh_state()
            if position > arm_start:
                state = run_folder.restore(checkpoints, position, state)
            task = bar.add_task(arm, total=steps, completed=position - arm_start, note="compiling")
            steps_left = range(position - arm_start + 1, steps + 1)
            batches = job.source.batches(
                job.num_held_out + text.batch_indices(settings.seed, step - 1, settings.batch_size, job.num_train)
                for step in steps_left
            )
            for step in steps_left:
                step_began = time.perf_counter()
                state, metrics = take(state, step, next(batches))
                loss = float(metrics["loss"])
                speed = settings.batch_size * settings.seq_len / (time.perf_counter() - step_began)
                position = arm_start + step
                log.write("train", position, model=arm, step=step, tokens_per_second=speed, **metrics)
                bar.update(task, completed=step, note=f"loss {loss:.3f}, {speed:.0f} tokens/s")

                if step % settings.eval_every == 0 or step == steps:
                    scores = evaluate(state["params"])
                    log.write("held_out", position, model=arm, step=step, **scores)
                    bar.console.print(f"{arm}, step {step}: {report.one_line(scores)}")
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
