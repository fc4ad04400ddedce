"""Distil SmolLM2-135M-Instruct (PyTorch) into a Flax NNX student with fewer layers, on the text of Python's manual.

    python -m examples.distill_smollm2

Two students start from the same evenly spaced layers of the teacher and see the same batches: one learns from the text
alone (cross-entropy), the other from the text and the teacher (a jaxkd loss). The folder ``--out`` gets a log in JSON
lines, the scores of both on held-out text as a table and as curves, and the newest checkpoint, from which ``--resume``
goes on. ``--help`` lists the flags.
"""

import os
import sys
import time
from functools import partial

os.environ.setdefault("TQDM_DISABLE", "1")  # transformers' bars; ours are rich's
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # else JAX leaves PyTorch a quarter of the GPU

import torch
from flax import nnx

from examples.smollm2 import arms, flags, report, run_folder, training
from examples.smollm2.job import launch, prepare
from examples.smollm2.memory import loss_memory
from examples.smollm2.model import student_from_teacher

TEACHER, PRUNED, CROSS_ENTROPY, DISTILLATION = "teacher", "pruned, untrained", "cross-entropy alone", "distillation"
LARGE_BATCH = 8192  # tokens, for the table of memory: the loss is compiled at this size, not run


def main(argv=None):
    return launch(run, flags.parse(argv))


def run(settings, device, console):
    began = time.perf_counter()
    folder = settings.out

    # The teacher is PyTorch's. It hands over hidden states and its head, never logits.
    torch_model, job = prepare(settings, device, console)

    # The rest is JAX's.
    graphdef, start = nnx.split(student_from_teacher(torch_model, settings.student_layers, job.dtype))
    del torch_model
    torch.cuda.empty_cache()
    loss_options = {
        "divergence": flags.divergence_of(settings),
        "temperature": settings.temperature,
        "chunk_size": flags.chunk_size_of(settings, device),
    }
    optimizer = training.optimizer_for(settings.learning_rate, settings.steps)
    train_step = training.make_train_step(graphdef, optimizer, **loss_options)
    evaluate = training.make_evaluate(graphdef)

    def score(params):
        return evaluate(params, job.held_out)

    fresh_state = partial(training.fresh_state, start, optimizer, device)

    def arm(*weights):
        return arms.Arm(lambda state, _, batch: train_step(state, batch, *weights), fresh_state, score, settings.seed)

    opened = run_folder.begin(folder, job.identity)
    log = opened.log
    if opened.is_new:
        with report.busy(console, "scoring the teacher and the student before training"):
            log.write("held_out", 0, model=TEACHER, step=0, **training.evaluate_teacher(job.held_out))
            log.write("held_out", 0, model=PRUNED, step=0, **score(start))
            heads = start["embed"]["embedding"][...], job.held_out.teacher.weight
            for num_rows in (settings.batch_size * settings.seq_len, LARGE_BATCH):
                sizes = loss_memory(num_rows, *heads, dtype=job.dtype, **loss_options)
                log.write("memory", 0, num_rows=num_rows, vocabulary=len(heads[1]), **sizes)

    students = {CROSS_ENTROPY: arm(0.0, 1.0), DISTILLATION: arm(settings.soft_weight, settings.hard_weight)}
    if not arms.train(students, job, opened, settings, console):
        return 130

    report.save_curves(folder / "curves.png", log, students, start=PRUNED, teacher=TEACHER)
    console.print(report.score_table({name: log.held_out(name)[-1] for name in (TEACHER, PRUNED, *students)}))
    console.print(report.memory_table(log.of("memory")))
    console.print(f"{time.perf_counter() - began:.0f} s; curves, log and the student's checkpoint are in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
