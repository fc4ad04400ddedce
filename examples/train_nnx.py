"""Distillation with Flax NNX, from start to end: a teacher and then a student learn Python's manual.

    python -m examples.train_nnx

The student never sees the teacher's logits: each hands over its last hidden states and its head.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxkd
from examples.printing import Table
from examples.words import random_windows, read_words

BATCH, LENGTH, VOCABULARY, HELD_OUT_WINDOWS = 8, 64, 4096, 64


class Block(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.attention = nnx.MultiHeadAttention(num_heads=4, in_features=width, decode=False, rngs=rngs)
        self.attention_norm, self.mlp_norm = nnx.RMSNorm(width, rngs=rngs), nnx.RMSNorm(width, rngs=rngs)
        self.up, self.down = nnx.Linear(width, 4 * width, rngs=rngs), nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.attention_norm(x), mask=nnx.make_causal_mask(x[..., 0]))
        return x + self.down(nnx.gelu(self.up(self.mlp_norm(x))))


class Decoder(nnx.Module):
    def __init__(self, width: int, layers: int, *, rngs: nnx.Rngs):
        self.tokens, self.positions = nnx.Embed(VOCABULARY, width, rngs=rngs), nnx.Embed(LENGTH, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, rngs=rngs) for _ in range(layers)])
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, VOCABULARY, use_bias=False, rngs=rngs)

    def hidden(self, tokens: jax.Array) -> jax.Array:
        """(B, T) tokens to (B, T, D) hidden states."""
        x = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def cross_entropy(model: Decoder, batch: jax.Array) -> jax.Array:
    logits = model.head(model.hidden(batch[:, :-1]))  # a teacher in training has no way around its logits
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


def distillation_loss(student: Decoder, teacher: Decoder, batch: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    tokens, labels = batch[:, :-1], batch[:, 1:]
    return jaxkd.fused_linear_jsd(
        student.hidden(tokens),  # (B, T, D)
        student.head.kernel.T,  # (V, D)
        teacher.hidden(tokens),
        teacher.head.kernel.T,
        labels,
        beta=0.5,
        hard_weight=0.5,
    )


@nnx.jit
def teach(teacher: Decoder, optimizer: nnx.Optimizer, batch: jax.Array) -> jax.Array:
    loss, gradients = nnx.value_and_grad(cross_entropy)(teacher, batch)
    optimizer.update(teacher, gradients)
    return loss


@nnx.jit
def distil(student: Decoder, teacher: Decoder, optimizer: nnx.Optimizer, batch: jax.Array) -> dict[str, jax.Array]:
    gradients, metrics = nnx.grad(distillation_loss, has_aux=True)(student, teacher, batch)
    optimizer.update(student, gradients)
    return metrics


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Distil a small decoder with Flax NNX.")
    parser.add_argument("--steps", type=int, default=150, help="steps of the teacher, and then of the student")
    steps = parser.parse_args(arguments).steps

    train, held_out = read_words(VOCABULARY, held_out=HELD_OUT_WINDOWS * (LENGTH + 1))
    print(f"Python's manual: {train.size} words to train on, {held_out.size} held out, {VOCABULARY} different ones.")
    print("Losses are in nats a word, the JSD is at most log 2 = 0.693: less is better. The first steps compile.")
    rng = np.random.default_rng(0)

    teacher, student = Decoder(128, 2, rngs=nnx.Rngs(0)), Decoder(64, 1, rngs=nnx.Rngs(1))
    optimizer = nnx.Optimizer(teacher, optax.adamw(3e-3), wrt=nnx.Param)
    progress = Table("The teacher, 2 layers of 128, learns the text: the loss of a batch", "step", "next-token loss")
    for step in range(1, steps + 1):
        loss = teach(teacher, optimizer, random_windows(train, rng, BATCH, LENGTH))
        if step % 25 == 0 or step == steps:
            progress.row(f"{step}", f"{loss:.3f}")

    unseen = held_out.reshape(HELD_OUT_WINDOWS, LENGTH + 1)
    evaluate = nnx.jit(lambda student, teacher: distillation_loss(student, teacher, unseen)[1])
    before = evaluate(student, teacher)
    columns = "next-token loss", "JSD to the teacher"
    progress = Table("The student, 1 layer of 64, learns from both: the losses of a batch", "step", *columns)
    optimizer = nnx.Optimizer(student, optax.adamw(3e-3), wrt=nnx.Param)
    for step in range(1, steps + 1):
        metrics = distil(student, teacher, optimizer, random_windows(train, rng, BATCH, LENGTH))
        if step % 25 == 0 or step == steps:
            progress.row(f"{step}", f"{metrics['hard']:.3f}", f"{metrics['soft']:.4f}")

    scores = Table("On held-out text", "model", *columns)
    scores.row("teacher", f"{nnx.jit(cross_entropy)(teacher, unseen):.3f}", "0")
    for name, metrics in (("student before", before), ("student after", evaluate(student, teacher))):
        scores.row(name, f"{metrics['hard']:.3f}", f"{metrics['soft']:.4f}")


if __name__ == "__main__":
    main()
