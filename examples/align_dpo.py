"""Preference alignment with Flax NNX, from start to end: a small decoder learns Python's manual, then a taste.

    python -m examples.align_dpo --loss dpo

The preference set is made of the manual. A prompt is the beginning of a passage; its two answers are how the manual
goes on there and how it goes on somewhere else, and the chosen one is that in rarer words. Held-out accuracy is the
share of pairs in which the chosen answer gained more than the other over the model before alignment: 0.5 is chance.
Lengths differ from answer to answer. No logits are formed on the way to a preference loss: `jaxkd.sequence_log_probs`
takes the hidden states and the head.
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
from examples.train_nnx import LENGTH, VOCABULARY, Decoder, cross_entropy
from examples.words import random_windows, read_words
from jaxkd import preference

matplotlib.use("Agg")
from matplotlib import pyplot

BATCH, PROMPT, SHORTEST, HELD_OUT_PAIRS = 8, 24, 8, 64
IGNORED = -100

Pairs = tuple[jax.Array, jax.Array]  # chosen and rejected, (B, T + 1) words each; IGNORED after the end of an answer


def draw_pairs(tokens: jax.Array, rng: np.random.Generator, count: int) -> Pairs:
    """Passages, and the same prompts with the answers of other passages: those in rarer words first."""
    passages, others = (np.array(random_windows(tokens, rng, count, LENGTH)) for _ in range(2))
    others[:, :PROMPT] = passages[:, :PROMPT]
    answers = np.stack([passages, others])  # (2, B, T + 1)
    lengths = PROMPT + rng.integers(SHORTEST, LENGTH + 2 - PROMPT, size=(2, count, 1))
    answers = np.where(np.arange(LENGTH + 1) < lengths, answers, IGNORED)
    ranks = np.where(answers == 0, VOCABULARY, answers)[..., PROMPT:]  # words are numbered by frequency, 0 is rarest
    rarity = np.mean(np.log(np.maximum(ranks, 1)), axis=-1, where=ranks != IGNORED)  # (2, B)
    first = np.argsort(-rarity, axis=0)[..., None]
    chosen, rejected = jnp.asarray(np.take_along_axis(answers, first, axis=0))
    return chosen, rejected


def log_probs(model: Decoder, answers: jax.Array, average: bool = False) -> jax.Array:
    """(B,): of each answer, given its prompt."""
    tokens, labels = jnp.maximum(answers[:, :-1], 0), answers[:, 1:].at[:, : PROMPT - 1].set(IGNORED)
    student = jaxkd.LinearLogits(model.hidden(tokens), model.head.kernel.T)
    return jaxkd.sequence_log_probs(student, labels, average=average)


def dpo_loss(policy: Decoder, reference: Decoder, pairs: Pairs) -> preference.Result:
    return preference.dpo(*(log_probs(model, x) for model in (policy, reference) for x in pairs), beta=0.1)


def orpo_loss(policy: Decoder, reference: Decoder, pairs: Pairs) -> preference.Result:
    return preference.orpo(*(log_probs(policy, x, average=True) for x in pairs), beta=0.5)


def kto_loss(policy: Decoder, reference: Decoder, pairs: Pairs) -> preference.Result:
    answers = jnp.concatenate(pairs)  # no longer pairs: each answer is good or bad by itself
    is_desirable = jnp.arange(len(answers)) < len(pairs[0])
    return preference.kto(log_probs(policy, answers), log_probs(reference, answers), is_desirable, beta=0.1)


LOSSES = {"dpo": dpo_loss, "orpo": orpo_loss, "kto": kto_loss}


@nnx.jit
def teach(model: Decoder, optimizer: nnx.Optimizer, batch: jax.Array) -> jax.Array:
    loss, gradients = nnx.value_and_grad(cross_entropy)(model, batch)
    optimizer.update(model, gradients)
    return loss


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Align a small decoder with a preference loss.")
    parser.add_argument("--loss", choices=LOSSES, default="dpo")
    parser.add_argument("--steps", type=int, default=100, help="steps of learning the text, and then of alignment")
    parser.add_argument("--plot", type=Path, default=Path("runs/align.png"))
    options = parser.parse_args(arguments)
    loss_of, steps = LOSSES[options.loss], options.steps

    train, held_out = read_words(VOCABULARY, held_out=20_000)
    rng = np.random.default_rng(0)
    print("A decoder of 1 layer learns Python's manual, then to prefer rarer words. The first steps compile.")
    progress = Table("The text, by the loss of a batch in nats a word", "step", "next-token loss")
    policy = Decoder(64, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(policy, optax.adamw(3e-3), wrt=nnx.Param)
    for step in range(1, steps + 1):
        loss = teach(policy, optimizer, random_windows(train, rng, BATCH, LENGTH))
        if step % 25 == 0 or step == steps:
            progress.row(f"{step}", f"{loss:.3f}")

    @nnx.jit
    def align(policy: Decoder, reference: Decoder, optimizer: nnx.Optimizer, pairs: Pairs) -> preference.Metrics:
        gradients, metrics = nnx.grad(loss_of, has_aux=True)(policy, reference, pairs)
        optimizer.update(policy, gradients)
        return metrics

    @nnx.jit
    def evaluate(policy: Decoder, reference: Decoder) -> tuple[jax.Array, jax.Array]:
        """On pairs never trained on: how often the chosen answer gained more, and how much more, in nats a word."""
        chosen, rejected = (log_probs(policy, x, True) - log_probs(reference, x, True) for x in unseen)
        return jnp.mean(chosen > rejected), jnp.mean(chosen - rejected)

    reference = nnx.clone(policy)  # the policy before alignment, which the rewards are measured from
    unseen = draw_pairs(held_out, rng, HELD_OUT_PAIRS)
    optimizer = nnx.Optimizer(policy, optax.adamw(1e-3), wrt=nnx.Param)
    history = []
    columns = "margin of the batch", "held out: accuracy", "nats a word"
    progress = Table(
        f"Alignment by {options.loss}. Accuracy: how often the chosen answer gained more than the other over the\n"
        "model before alignment, where 0.5 is chance; then how much more",
        "step",
        *columns,
    )
    for step in range(1, steps + 1):
        metrics = align(policy, reference, optimizer, draw_pairs(train, rng, BATCH))
        if step % 10 == 0 or step == steps:
            accuracy, gap = evaluate(policy, reference)
            history.append((step, float(accuracy), float(gap), float(metrics["margin"])))
            progress.row(f"{step}", f"{metrics['margin']:.3f}", f"{accuracy:.3f}", f"{gap:.4f}")
    print(f"\nOn {HELD_OUT_PAIRS} held-out pairs: accuracy {accuracy:.3f}, margin {gap:.4f} nats a word")

    step_axis, *curves = np.array(history).T
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
    titles = (
        "held out: chosen answer gained more",
        "held out: nats a word that it gained more",
        "margin of the training batch",
    )
    for axis, title, curve in zip(axes, titles, curves, strict=True):
        axis.plot(step_axis, curve)
        axis.set(title=title, xlabel=f"steps of {options.loss}")
    axes[0].axhline(0.5, color="grey", linestyle="--", label="chance")
    axes[0].set_ylim(0, 1)
    axes[0].legend(loc="lower right")
    options.plot.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.plot, dpi=120)
    pyplot.close(figure)
    print(f"Plot: {options.plot}")


if __name__ == "__main__":
    main()
