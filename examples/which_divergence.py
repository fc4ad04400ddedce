"""Which divergence? SmolLM2-135M-Instruct distilled with one after the other, some seeds of each, on the same text.

    python -m examples.which_divergence

Students of ``--student-layers`` evenly spaced layers take ``--steps`` steps on the sources of Python's standard library
(``--text`` for others): with cross-entropy alone, with each divergence alone, and on policy, where forward KL warms up
and then a share of the batches are the student's own samples with reverse KL on them. All students of a depth start the
same; a seed is another order of the data and other samples. The folder ``--out`` gets what ``examples.distill_smollm2``
writes, all scores as ``scores.json``, and a picture of them. A GPU is wanted: 36 students take 25 minutes on an H100
(``examples/measured/which_divergence_h100.json``).
"""

import os
import sys
import time
from functools import partial

os.environ.setdefault("TQDM_DISABLE", "1")  # transformers' bars; ours are rich's
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # else JAX leaves PyTorch a quarter of the GPU

import torch
from flax import nnx

from examples.smollm2 import arms, flags, run_folder, sampling, spread, text, training
from examples.smollm2.job import launch, prepare
from examples.smollm2.model import student_from_teacher

TEACHER = "teacher"


def main(argv=None):
    return launch(run, flags.parse_which_divergence(argv))


def run(settings, device, console):
    began = time.perf_counter()
    settings.text = settings.text or text.standard_library()
    torch_model, job = prepare(settings, device, console)
    starts = {layers: student_from_teacher(torch_model, layers, job.dtype) for layers in settings.student_layers}
    sample_batch_of = sampling.sampler_of(torch_model, job, settings)
    del torch_model
    torch.cuda.empty_cache()

    opened = run_folder.begin(settings.out, job.identity)
    if opened.is_new:
        opened.log.write("held_out", 0, model=TEACHER, step=0, **training.evaluate_teacher(job.held_out))
    models, to_train = {}, {}  # by their names in the log: (layers, arm, seed), and the arms
    for layers, student in starts.items():
        graphdef, start = nnx.split(student)
        sample_batch = sample_batch_of(graphdef)
        evaluate = sampling.make_evaluate(graphdef, sample_batch, job.held_out, settings.seed)
        models[f"{layers} layers, untrained"] = layers, spread.UNTRAINED, settings.seed
        if opened.is_new:
            opened.log.write("held_out", 0, model=f"{layers} layers, untrained", step=0, **evaluate(start))
        optimizer = training.optimizer_for(settings.learning_rate, settings.steps)
        takes = takes_of(graphdef, optimizer, sample_batch, settings, flags.chunk_size_of(settings, device))
        fresh_state = partial(training.fresh_state, start, optimizer, device)
        for name in settings.arms:
            for seed in range(settings.seed, settings.seed + settings.seeds):
                model = f"{layers} layers, {name}, seed {seed}"
                models[model] = layers, name, seed
                to_train[model] = arms.Arm(partial(takes[name], seed), fresh_state, evaluate, seed)
    if not arms.train(to_train, job, opened, settings, console):
        return 130

    students = [
        {"layers": layers, "arm": arm, "seed": seed, **last_scores(opened.log, name)}
        for name, (layers, arm, seed) in models.items()
    ]
    results = {"settings": job.identity, "teacher": last_scores(opened.log, TEACHER), "students": students}
    spread.save(settings.out / "scores.json", results)
    spread.picture(results).savefig(settings.out / "scores.png", dpi=120)
    for table in spread.tables(results):
        console.print(table)
    console.print(f"{time.perf_counter() - began:.0f} s; scores, their picture and the log are in {settings.out}")
    return 0


def last_scores(log, model):
    record = log.held_out(model)[-1]
    return {key: record[key] for key in spread.SCORES if key in record}


def takes_of(graphdef, optimizer, sample_batch, settings, chunk_size):
    """By the name of an arm ``take(seed, state, step, batch)``."""
    weights = settings.soft_weight, settings.hard_weight
    options = {"temperature": settings.temperature, "chunk_size": chunk_size}
    steps = {
        name: training.make_train_step(graphdef, optimizer, divergence=flags.DIVERGENCES[name](None), **options)
        for name in flags.ARMS
        if name in flags.DIVERGENCES
    }

    def cross_entropy(seed, state, step, batch):
        return steps["forward_kl"](state, batch, 0.0, 1.0)

    def distillation(name, seed, state, step, batch):
        return steps[name](state, batch, *weights)

    def on_policy(seed, state, step, batch):
        if not sampling.is_sampled(step, settings.on_policy, settings.warm_up):
            return distillation("forward_kl", seed, state, step, batch)
        sampled = sample_batch(state["params"], batch.tokens, sampling.key_of(seed, step))
        return steps["reverse_kl"](state, sampled, settings.soft_weight, 0.0)

    return {
        "cross_entropy": cross_entropy,
        **{name: partial(distillation, name) for name in steps},
        "on_policy": on_policy,
    }


if __name__ == "__main__":
    sys.exit(main())
