"""Distillation with Flax Linen, from start to end: a teacher and then a student learn Python's manual.

    python -m examples.train_linen

The student never sees the teacher's logits: each hands over its last hidden states and its head.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import jaxkd
from examples.printing import Table
from examples.words import random_windows, read_words

BATCH, LENGTH, VOCABULARY, HELD_OUT_WINDOWS = 8, 64, 4096, 64


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        x = x + nn.MultiHeadDotProductAttention(num_heads=4)(nn.RMSNorm()(x), mask=nn.make_causal_mask(x[..., 0]))
        return x + nn.Dense(width)(nn.gelu(nn.Dense(4 * width)(nn.RMSNorm()(x))))


class Decoder(nn.Module):
    width: int
    layers: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(B, T) tokens to (B, T, D) hidden states and the (D, V) kernel of the head."""
        positions = jnp.arange(tokens.shape[1])
        x = nn.Embed(VOCABULARY, self.width)(tokens) + nn.Embed(LENGTH, self.width)(positions)
        for _ in range(self.layers):
            x = Block()(x)
        return nn.RMSNorm()(x), self.param("head", nn.initializers.lecun_normal(), (self.width, VOCABULARY))


TEACHER, STUDENT = Decoder(width=128, layers=2), Decoder(width=64, layers=1)
OPTIMIZER = optax.adamw(3e-3)


def apply(model: Decoder, parameters: dict, tokens: jax.Array) -> Any:
    return model.apply(parameters, tokens)


def cross_entropy(teacher: dict, batch: jax.Array) -> jax.Array:
    hidden, kernel = apply(TEACHER, teacher, batch[:, :-1])
    logits = hidden @ kernel  # a teacher in training has no way around its logits
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


def distillation_loss(student: dict, teacher: dict, batch: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    tokens, labels = batch[:, :-1], batch[:, 1:]
    student_hidden, student_kernel = apply(STUDENT, student, tokens)
    teacher_hidden, teacher_kernel = apply(TEACHER, teacher, tokens)
    return jaxkd.fused_linear_jsd(
        student_hidden,  # (B, T, D)
        student_kernel.T,  # (V, D)
        teacher_hidden,
        teacher_kernel.T,
        labels,
        beta=0.5,
        hard_weight=0.5,
    )


@jax.jit
def teach(teacher: dict, state: optax.OptState, batch: jax.Array) -> tuple[dict, optax.OptState, jax.Array]:
    loss, gradients = jax.value_and_grad(cross_entropy)(teacher, batch)
    updates, state = OPTIMIZER.update(gradients, state, teacher)
    return optax.apply_updates(teacher, updates), state, loss


@jax.jit
def distil(student: dict, state: optax.OptState, teacher: dict, batch: jax.Array) -> tuple[dict, optax.OptState, dict]:
    gradients, metrics = jax.grad(distillation_loss, has_aux=True)(student, teacher, batch)
    updates, state = OPTIMIZER.update(gradients, state, student)
    return optax.apply_updates(student, updates), state, metrics


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Distil a small decoder with Flax Linen.")
    parser.add_argument("--steps", type=int, default=150, help="steps of the teacher, and then of the student")
    steps = parser.parse_args(arguments).steps

    train, held_out = read_words(VOCABULARY, held_out=HELD_OUT_WINDOWS * (LENGTH + 1))
    print(f"Python's manual: {train.size} words to train on, {held_out.size} held out, {VOCABULARY} different ones.")
    print("Losses are in nats a word, the JSD is at most log 2 = 0.693: less is better. The first steps compile.")
    rng = np.random.default_rng(0)

    teacher, student = (
        model.init(jax.random.key(seed), held_out[None, :LENGTH]) for seed, model in enumerate((TEACHER, STUDENT))
    )
    state = OPTIMIZER.init(teacher)
    progress = Table("The teacher, 2 layers of 128, learns the text: the loss of a batch", "step", "next-token loss")
    for step in range(1, steps + 1):
        teacher, state, loss = teach(teacher, state, random_windows(train, rng, BATCH, LENGTH))
        if step % 25 == 0 or step == steps:
            progress.row(f"{step}", f"{loss:.3f}")

    unseen = held_out.reshape(HELD_OUT_WINDOWS, LENGTH + 1)
    evaluate = jax.jit(lambda student, teacher: distillation_loss(student, teacher, unseen)[1])
    before = evaluate(student, teacher)
    columns = "next-token loss", "JSD to the teacher"
    progress = Table("The student, 1 layer of 64, learns from both: the losses of a batch", "step", *columns)
    state = OPTIMIZER.init(student)
    for step in range(1, steps + 1):
        student, state, metrics = distil(student, state, teacher, random_windows(train, rng, BATCH, LENGTH))
        if step % 25 == 0 or step == steps:
            progress.row(f"{step}", f"{metrics['hard']:.3f}", f"{metrics['soft']:.4f}")

    scores = Table("On held-out text", "model", *columns)
    scores.row("teacher", f"{jax.jit(cross_entropy)(teacher, unseen):.3f}", "0")
    for name, metrics in (("student before", before), ("student after", evaluate(student, teacher))):
        scores.row(name, f"{metrics['hard']:.3f}", f"{metrics['soft']:.4f}")


if __name__ == "__main__":
    main()
