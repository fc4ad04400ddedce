"""Distil SmolLM2-135M-Instruct (PyTorch) into a Flax NNX student with fewer layers, on the text of Python's manual.

    python -m examples.distill_smollm2

Two students start from the same evenly spaced layers of the teacher and see the same batches: one learns from the text
alone (cross-entropy), the other from the text and the teacher (a jaxkd loss). The folder ``--out`` gets a log in JSON
lines, the scores of both on held-out text as a table and as curves, and the newest checkpoint, from which ``--resume``
goes on. ``--help`` lists the flags.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from functools import partial

os.environ.setdefault("TQDM_DISABLE", "1")  # transformers' bars; ours are rich's
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # else JAX leaves PyTorch a quarter of the GPU

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from rich.console import Console
from rich.progress import track

from examples.smollm2 import flags, report, run_folder, teacher, text, training
from examples.smollm2.memory import loss_memory
from examples.smollm2.model import student_from_teacher
from torch_bridge.teachers import model_fingerprint

TEACHER, PRUNED, CROSS_ENTROPY, DISTILLATION = "teacher", "pruned, untrained", "cross-entropy alone", "distillation"
LARGE_BATCH = 8192  # tokens, for the table of memory: the loss is compiled at this size, not run


class SettingsError(Exception):
    """A flag does not fit the machine, the teacher or the text; the message says which."""


def main(argv=None):
    settings = flags.parse(argv)
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


def run(settings, device, console):
    began = time.perf_counter()
    folder, steps = settings.out, settings.steps
    dtype = settings.dtype or ("bfloat16" if device == "gpu" else "float32")
    identity = flags.lasting(settings) | {"dtype": dtype}
    run_folder.check(folder, identity, resume=settings.resume)

    # The teacher is PyTorch's. It hands over hidden states and its head, never logits.
    with console.status("opening the teacher"):
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
        progress = partial(track, description="the teacher reads", console=console, transient=True)
        source = teacher.cached(
            torch_model, tokenizer, windows, settings.cache, name=teacher_name, dtype=dtype, progress=progress
        )
    (held_out,) = source.batches([np.arange(num_held_out)])
    console.print(f"{held_out.tokens.size} tokens held out, {num_train * settings.seq_len} to train on")

    # The rest is JAX's.
    graphdef, start = nnx.split(student_from_teacher(torch_model, settings.student_layers, dtype))
    teacher_head = held_out.teacher.weight
    del torch_model
    torch.cuda.empty_cache()
    loss_options = {
        "divergence": flags.DIVERGENCES[settings.divergence](settings.beta),
        "temperature": settings.temperature,
        "chunk_size": settings.chunk_size or (64 if device == "cpu" else None),
    }
    optimizer = training.optimizer_for(settings.learning_rate, steps)
    train_step = training.make_train_step(graphdef, optimizer, **loss_options)
    evaluate = training.make_evaluate(graphdef)

    def fresh_state():
        params = jax.tree.map(jnp.copy, start)
        state = {"params": params, "opt_state": optimizer.init(params)}
        return jax.device_put(state, jax.devices(device)[0])  # committed, as a step returns it: else it compiles twice

    run_folder.claim(folder, identity)
    checkpoints = run_folder.open_checkpoints(folder / "checkpoints")
    position = checkpoints.latest_step()  # steps done, over both arms
    log = run_folder.Log(folder / "log.jsonl", upto=-1 if position is None else position)
    if position is None:
        position = 0
        with console.status("scoring the teacher and the student before training"):
            log.write("held_out", 0, model=TEACHER, step=0, **training.evaluate_teacher(held_out))
            log.write("held_out", 0, model=PRUNED, step=0, **evaluate(start, held_out))
            heads = start["embed"]["embedding"][...], teacher_head
            for num_rows in (settings.batch_size * settings.seq_len, LARGE_BATCH):
                sizes = loss_memory(num_rows, *heads, dtype=dtype, **loss_options)
                log.write("memory", 0, num_rows=num_rows, vocabulary=len(teacher_head), **sizes)
    else:
        console.print(f"going on after step {position} of {2 * steps}")

    arms = {CROSS_ENTROPY: (0.0, 1.0), DISTILLATION: (settings.soft_weight, settings.hard_weight)}
    with stop_on_interrupt() as stop, report.progress_bar(console) as bar:
        for arm_index, (arm, weights) in enumerate(arms.items()):
            arm_start = arm_index * steps
            if position >= arm_start + steps:
                continue
            state = fresh_state()
            if position > arm_start:
                state = run_folder.restore(checkpoints, position, state)
            task = bar.add_task(arm, total=steps, completed=position - arm_start, note="compiling")
            steps_left = range(position - arm_start + 1, steps + 1)
            batches = source.batches(
                num_held_out + text.batch_indices(settings.seed, step - 1, settings.batch_size, num_train)
                for step in steps_left
            )
            for step in steps_left:
                step_began = time.perf_counter()
                state, metrics = train_step(state, next(batches), *weights)
                loss = float(metrics["loss"])
                speed = settings.batch_size * settings.seq_len / (time.perf_counter() - step_began)
                position = arm_start + step
                log.write("train", position, model=arm, step=step, tokens_per_second=speed, **metrics)
                bar.update(task, completed=step, note=f"loss {loss:.3f}, {speed:.0f} tokens/s")

                if step % settings.eval_every == 0 or step == steps:
                    scores = evaluate(state["params"], held_out)
                    log.write("held_out", position, model=arm, step=step, **scores)
                    bar.console.print(f"{arm}, step {step}: {report.one_line(scores)}")
                if step % settings.checkpoint_every == 0 or step == steps or stop.is_set():
                    run_folder.save(checkpoints, position, state)
                if stop.is_set() and position < 2 * steps:
                    bar.stop()
                    console.print(f"stopped after step {position} of {2 * steps}: add --resume to the command to go on")
                    return 130

    report.save_curves(folder / "curves.png", log, arms, start=PRUNED, teacher=TEACHER)
    console.print(report.score_table({name: log.held_out(name)[-1] for name in (TEACHER, PRUNED, *arms)}))
    console.print(report.memory_table(log.of("memory")))
    console.print(f"{time.perf_counter() - began:.0f} s; curves, log and the student's checkpoint are in {folder}")
    return 0


def choose_device(wanted):
    """The name of a JAX platform: the GPU where both frameworks have one, unless told otherwise."""
    both = jax.default_backend() == "gpu" and torch.cuda.is_available()
    if wanted == "gpu" and not both:
        raise SettingsError("--device gpu: JAX and PyTorch must both see a CUDA GPU here, and one does not")
    return wanted or ("gpu" if both else "cpu")


def split_text(settings, tokenizer, config):
    """The windows held out and those to train on, (N, seq_len + 1) tokens each."""
    if settings.student_layers > config.num_hidden_layers:
        raise SettingsError(f"--student-layers {settings.student_layers}: the teacher has {config.num_hidden_layers}")
    tokens = tokenizer(text.read_text(settings.text), add_special_tokens=False, verbose=False)["input_ids"]
    windows = text.windows_of(tokens, settings.seq_len)
    if len(windows) < settings.held_out_windows + settings.batch_size:
        raise SettingsError(
            f"the text has {len(windows)} windows of {settings.seq_len} tokens, too few for --held-out-windows "
            f"{settings.held_out_windows} and --batch-size {settings.batch_size}: give more --text or smaller values"
        )
    train = min(settings.train_windows, settings.steps * settings.batch_size)
    return text.split(windows, settings.held_out_windows, train, settings.seed)


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


if __name__ == "__main__":
    sys.exit(main())
