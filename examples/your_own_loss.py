"""A row loss of your own, chunked: decoupled knowledge distillation, in a page.

    python -m examples.your_own_loss

DKD (Zhao et al., arXiv 2203.08679) splits the KL divergence in two: whether the student is as sure of the right token
as the teacher, and whether it ranks the other tokens as the teacher does. The second part has a weight of its own,
where plain KL drowns it out as soon as the teacher is sure. It needs the label and whole rows of both models' logits,
so it is none of jaxkd's losses; as a function of one chunk's logits it runs like one. Two students of one
initialisation learn Python's manual from one teacher, with plain KL and with DKD, and `jaxkd.token_statistics` says
what they have learnt.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from flax import nnx

import jaxkd
from examples.printing import Table
from examples.train_nnx import BATCH, LENGTH, VOCABULARY, Decoder, teach
from examples.words import random_windows, read_words

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HELD_OUT_WINDOWS, EVALUATE_EVERY = 16, 20


def decoupled_kl(logits, labels, teacher_logits, weights):
    """(C, V), (C,), (C, V) -> (C,): what a loss of your own is."""
    is_label = jax.nn.one_hot(labels, logits.shape[1], dtype=bool)
    binary, others = [], []
    for z in (teacher_logits, logits):
        log_p = jax.nn.log_softmax(z)
        label, rest = (jnp.where(part, log_p, -jnp.inf) for part in (is_label, ~is_label))
        binary.append(jnp.stack([jnp.max(label, axis=1), jax.nn.logsumexp(rest, axis=1)], axis=1))  # (C, 2)
        others.append(jax.nn.log_softmax(rest))  # (C, V), -inf at the label
    target, non_target = jaxkd.forward_kl(*binary), jaxkd.forward_kl(*others)
    return weights["target"] * target + weights["others"] * non_target, {"target": target, "others": non_target}


def models(student: Decoder, teacher: Decoder, tokens: jax.Array) -> tuple[jaxkd.LinearLogits, jaxkd.LinearLogits]:
    of_student = jaxkd.LinearLogits(student.hidden(tokens), student.head.kernel.T)
    return of_student, jax.lax.stop_gradient(jaxkd.LinearLogits(teacher.hidden(tokens), teacher.head.kernel.T))


def plain_loss(student: Decoder, teacher: Decoder, batch: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    return jaxkd.distillation_loss(*models(student, teacher, batch[:, :-1]), batch[:, 1:])


def own_loss(student: Decoder, teacher: Decoder, batch: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    of_student, of_teacher = models(student, teacher, batch[:, :-1])
    weights = {"target": jnp.asarray(1.0), "others": jnp.asarray(2.0)}
    return jaxkd.chunked_loss(decoupled_kl, of_student, batch[:, 1:], per_row=of_teacher, shared=weights)


@nnx.jit(static_argnames="loss")
def distil(student: Decoder, teacher: Decoder, optimizer: nnx.Optimizer, batch: jax.Array, loss) -> None:
    gradients, _ = nnx.grad(loss, has_aux=True)(student, teacher, batch)
    optimizer.update(student, gradients)


@nnx.jit
def evaluate(student: Decoder, teacher: Decoder, batch: jax.Array) -> dict[str, jax.Array]:
    of_student, of_teacher = models(student, teacher, batch[:, :-1])
    statistics = jaxkd.token_statistics(of_student, batch[:, 1:], of_teacher, divergence=jaxkd.jensen_shannon())
    return {name: jnp.mean(statistics[name]) for name in ("agrees", "soft", "log_prob")}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Distil a small decoder with a loss that jaxkd does not have.")
    parser.add_argument("--steps", type=int, default=100, help="steps of the teacher, and then of each student")
    parser.add_argument("--out", type=Path, default=Path("runs/your_own_loss"), help="folder of the plot")
    options = parser.parse_args(arguments)

    train, held_out = read_words(VOCABULARY, held_out=HELD_OUT_WINDOWS * (LENGTH + 1))
    unseen = held_out.reshape(HELD_OUT_WINDOWS, LENGTH + 1)
    print(f"A teacher learns Python's manual in {options.steps} steps, then two students from it, by a loss each.")
    columns = "next-token loss", "JSD to the teacher", "agreement with its likeliest word"
    table = Table("On held-out text, losses in nats a word", "model", *columns, first=24)
    rng = np.random.default_rng(0)
    teacher = Decoder(128, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(teacher, optax.adamw(3e-3), wrt=nnx.Param)
    for _ in range(options.steps):
        teach(teacher, optimizer, random_windows(train, rng, BATCH, LENGTH))
    of_teacher = evaluate(teacher, teacher, unseen)
    table.row("teacher", f"{-of_teacher['log_prob']:.3f}", "0", f"{of_teacher['agrees']:.1%}")

    curves = {}
    for name, function in (("forward KL", plain_loss), ("decoupled KL", own_loss)):
        rng = np.random.default_rng(1)
        student = Decoder(64, 1, rngs=nnx.Rngs(1))
        optimizer = nnx.Optimizer(student, optax.adamw(3e-3), wrt=nnx.Param)
        curves[name] = [(0, evaluate(student, teacher, unseen))]
        for step in range(1, options.steps + 1):
            distil(student, teacher, optimizer, random_windows(train, rng, BATCH, LENGTH), function)
            if step % EVALUATE_EVERY == 0 or step == options.steps:
                curves[name].append((step, evaluate(student, teacher, unseen)))
                print(f"    {name}, step {step}: JSD {curves[name][-1][1]['soft']:.4f}", flush=True)
        for when, (_, scores) in (("before", curves[name][0]), ("after", curves[name][-1])):
            numbers = f"{-scores['log_prob']:.3f}", f"{scores['soft']:.4f}", f"{scores['agrees']:.1%}"
            table.row(f"{name}, {when}", *numbers)

    labels = {"soft": "JSD to the teacher", "agrees": "top-1 agreement", "log_prob": "log-probability of the text"}
    _, panels = plt.subplots(1, len(labels), figsize=(12, 3.5), layout="constrained")
    for panel, (score, label) in zip(panels, labels.items(), strict=True):
        for name, points in curves.items():
            panel.plot([step for step, _ in points], [float(scores[score]) for _, scores in points], label=name)
        panel.set(title=f"{label}, held out", xlabel="step")
    panels[0].legend()
    options.out.mkdir(parents=True, exist_ok=True)
    plt.savefig(options.out / "curves.png", dpi=120)
    print(f"\nPlot: {options.out / 'curves.png'}")


if __name__ == "__main__":
    main()
