"""Matryoshka embeddings of real text, at a batch whose similarities do not fit in the memory that the step is given.

    python -m examples.train_embeddings

The text is Python's own: its manual and the docstrings of its standard library. A random half of the words of each
passage shall find the other half among those of all passages of the batch. The first 8, 16 and 32 components of the
embeddings are trained to be embeddings themselves; the plot shows how often they find a passage never trained on.
"""

import argparse
import pydoc_data.topics
import re
import sysconfig
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from flax import nnx

from examples.printing import Table
from jaxkd.embedding import info_nce, matryoshka

matplotlib.use("agg")
import matplotlib.pyplot as plt

PASSAGE, VOCABULARY, WIDTH, SIZES, HELD_OUT, SCALE = 24, 4096, 64, (64, 32, 16, 8), 512, 20.0
MIB = 2**20
Halves = tuple[jax.Array, jax.Array]


def read_passages() -> np.ndarray:
    """(N, PASSAGE) word ids without duplicates, in random order; id 0 is every word not among the common ones."""
    texts = list(pydoc_data.topics.topics.values())
    library = Path(sysconfig.get_path("stdlib"))
    for file in sorted([*library.glob("*.py"), *library.glob("[a-z]*/*.py")]):
        if file.parent.name not in ("site-packages", "test"):
            texts += re.findall(r'"""(.*?)"""', file.read_text(errors="replace"), re.DOTALL)
    words = [re.findall(r"\w+", text.lower()) for text in texts]
    passages = [x[i : i + PASSAGE] for x in words for i in range(0, len(x) - PASSAGE + 1, PASSAGE)]
    _, ids, counts = np.unique(passages, return_inverse=True, return_counts=True)
    rank = np.argsort(np.argsort(-counts, kind="stable")) + 1
    ids = np.where(rank < VOCABULARY, rank, 0)[ids].reshape(-1, PASSAGE)
    return np.random.default_rng(0).permutation(np.unique(ids, axis=0)).astype(np.int32)


def random_halves(passages: np.ndarray, rng: np.random.Generator) -> Halves:
    """Each passage's words dealt to two arrays (B, PASSAGE / 2)."""
    dealt = rng.permuted(passages, axis=1)
    return jnp.asarray(dealt[:, : PASSAGE // 2]), jnp.asarray(dealt[:, PASSAGE // 2 :])


class Encoder(nnx.Module):
    """A bag of words and a small network."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.words = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.up, self.down = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs), nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, texts: jax.Array) -> jax.Array:
        """(B, T) words to (B, D) embeddings."""
        bag = self.words(texts[:, 0])
        for i in range(1, texts.shape[1]):  # (B, T, D) never exists
            bag += self.words(texts[:, i])
        return bag + self.down(nnx.gelu(self.up(bag)))


def loss_of(encoder: Encoder, halves: Halves) -> tuple[jax.Array, dict[str, jax.Array]]:
    loss = matryoshka(partial(info_nce, scale=SCALE), SIZES, normalize=False)
    return loss(encoder(halves[0]), encoder(halves[1]))


@nnx.jit
def train(encoder: Encoder, optimizer: nnx.Optimizer, halves: Halves) -> dict[str, jax.Array]:
    gradients, metrics = nnx.grad(loss_of, has_aux=True)(encoder, halves)
    optimizer.update(encoder, gradients)
    return metrics


@nnx.jit
def accuracies(encoder: Encoder, halves: Halves) -> list[jax.Array]:
    """How often a half finds its other half among the held-out ones, by size."""
    metrics = loss_of(encoder, halves)[1]
    return [metrics[f"accuracy_{size}"] for size in SIZES]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train Matryoshka embeddings at a large batch in little memory.")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--memory", type=float, default=96, help="MiB that a training step may take beyond its inputs")
    parser.add_argument("--plot", type=Path, default=Path("runs/embeddings.png"))
    options = parser.parse_args(arguments)

    passages = read_passages()
    held_out, passages = passages[:HELD_OUT], passages[HELD_OUT:]
    rng = np.random.default_rng(1)
    unseen = random_halves(held_out, rng)
    encoder = Encoder(rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(encoder, optax.adam(3e-2), wrt=nnx.Param)

    def next_halves() -> Halves:
        return random_halves(passages[rng.choice(len(passages), options.batch, replace=False)], rng)

    # Similarities, their softmax and their gradient, in float32, of one size.
    dense = 3 * 4 * options.batch**2 / MIB
    memory = train.lower(encoder, optimizer, next_halves()).compile().memory_analysis()
    assert memory is not None, "this backend does not tell the memory of what it compiles"
    step = memory.temp_size_in_bytes / MIB
    print(f"{len(passages)} passages of Python's documentation, whose halves shall find each other")
    table = Table(f"A step with a batch of {options.batch}, beyond its inputs", "", "MiB", first=20)
    table.row("as compiled", f"{step:.1f}")
    table.row("it may take", f"{options.memory:.1f}")
    table.row("dense similarities", f"{dense:.1f}")
    if not step <= options.memory < dense:
        parser.error(
            f"--memory {options.memory:g} shall hold the step, {step:.1f}, and not the similarities, {dense:.1f}"
        )

    progress = Table("Training: the loss of a batch by components", "step", *map(str, SIZES))
    before = [float(x) for x in accuracies(encoder, unseen)]
    for number in range(1, options.steps + 1):
        metrics = train(encoder, optimizer, next_halves())
        if number % 5 == 0 or number == options.steps:
            progress.row(f"{number}", *(f"{metrics[f'loss_{size}']:.3f}" for size in SIZES))
    after = [float(x) for x in accuracies(encoder, unseen)]
    scores = Table(f"Halves found among {len(held_out)} held out", "components", "before", "after")
    for size, old, new in zip(SIZES, before, after, strict=True):
        scores.row(f"{size}", f"{old:.1%}", f"{new:.1%}")

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, values in (("before training", before), ("after", after)):
        axes.plot(SIZES, values, marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(SIZES, [str(size) for size in SIZES])
    axes.set(xlabel="components of the embedding", ylabel=f"top-1 accuracy among {HELD_OUT}")
    axes.set_ylim(bottom=0)
    axes.legend()
    options.plot.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.plot, dpi=150)
    plt.close(figure)
    print(f"\nPlot: {options.plot}")


if __name__ == "__main__":
    main()
