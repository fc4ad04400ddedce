"""On-policy distillation: the student samples, the teacher scores each token of it, and their divergence trains.

    python -m examples.on_policy

Three students start from the same evenly spaced layers of SmolLM2-135M-Instruct and take as many steps: one learns from
text alone (cross-entropy), one from the teacher's distributions over that text (forward KL), and one does so too, but
a share ``--on-policy`` of its batches, after ``--warm-up`` steps, are its own: it goes on from the first tokens of a
batch's windows, and learns from ``--divergence`` at the tokens that it sampled. That is GKD (arXiv 2306.13649); with
``--loss sampled`` no whole distributions are compared, but the probabilities of the sampled tokens. All are scored on
held-out text, and by their divergence from the teacher where they go on from it themselves. Log, curves, checkpoints,
``--resume`` and the other flags are those of ``examples.distill_smollm2``.
"""

import os
import sys
import time
from functools import partial

os.environ.setdefault("TQDM_DISABLE", "1")  # transformers' bars; ours are rich's
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # else JAX leaves PyTorch a quarter of the GPU

import torch
from flax import nnx

import jaxkd
from examples.smollm2 import arms, flags, report, run_folder, sampling, training
from examples.smollm2.job import launch, prepare
from examples.smollm2.model import student_from_teacher

TEACHER, PRUNED = "teacher", "pruned, untrained"
CROSS_ENTROPY, OFF_POLICY, ON_POLICY = "cross-entropy alone", "off-policy distillation", "on-policy distillation"


def main(argv=None):
    return launch(run, flags.parse_on_policy(argv))


def run(settings, device, console):
    began = time.perf_counter()
    torch_model, job = prepare(settings, device, console)
    graphdef, start = nnx.split(student_from_teacher(torch_model, settings.student_layers, job.dtype))

    # Samples are read by a Flax port of the teacher, on the device and in the same program as the sampler.
    sample_batch = sampling.sampler_of(torch_model, job, settings)(graphdef)
    del torch_model
    torch.cuda.empty_cache()

    optimizer = training.optimizer_for(settings.learning_rate, settings.steps)
    loss_options = {"temperature": settings.temperature, "chunk_size": flags.chunk_size_of(settings, device)}
    text_step = training.make_train_step(graphdef, optimizer, divergence=jaxkd.forward_kl, **loss_options)
    if settings.loss == "sampled":
        sample_step = training.make_train_step(graphdef, optimizer, sampling.sampled_reverse_kl, **loss_options)
    else:
        divergence = flags.divergence_of(settings)
        sample_step = training.make_train_step(graphdef, optimizer, divergence=divergence, **loss_options)

    def cross_entropy(state, step, batch):
        return text_step(state, batch, 0.0, 1.0)

    def off_policy(state, step, batch):
        return text_step(state, batch, settings.soft_weight, settings.hard_weight)

    def on_policy(state, step, batch):
        if not sampling.is_sampled(step, settings.on_policy, settings.warm_up):
            return off_policy(state, step, batch)
        batch = sample_batch(state["params"], batch.tokens, sampling.key_of(settings.seed, step))
        return sample_step(state, batch, settings.soft_weight, 0.0)  # its own tokens are no truth to learn

    evaluate = sampling.make_evaluate(graphdef, sample_batch, job.held_out, settings.seed)
    opened = run_folder.begin(settings.out, job.identity)
    log = opened.log
    if opened.is_new:
        with report.busy(console, "scoring the teacher and the student before training"):
            log.write("held_out", 0, model=TEACHER, step=0, **training.evaluate_teacher(job.held_out))
            log.write("held_out", 0, model=PRUNED, step=0, **evaluate(start))

    takes = {CROSS_ENTROPY: cross_entropy, OFF_POLICY: off_policy, ON_POLICY: on_policy}
    fresh_state = partial(training.fresh_state, start, optimizer, device)
    students = {name: arms.Arm(take, fresh_state, evaluate, settings.seed) for name, take in takes.items()}
    if not arms.train(students, job, opened, settings, console):
        return 130

    report.save_curves(settings.out / "curves.png", log, students, start=PRUNED, teacher=TEACHER)
    console.print(report.score_table({name: log.held_out(name)[-1] for name in (TEACHER, PRUNED, *students)}))
    console.print(f"{time.perf_counter() - began:.0f} s; curves, log and the checkpoint are in {settings.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
