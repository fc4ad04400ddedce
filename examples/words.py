"""Real text for the small examples: Python's own documentation, in every CPython, as word ids."""

import collections
import pydoc_data.topics
import re

import jax
import jax.numpy as jnp
import numpy as np


def read_words(vocabulary: int, held_out: int) -> tuple[jax.Array, jax.Array]:
    """The text but its last ``held_out`` words, and these; id 0 is every word that is not among the common ones."""
    words = re.findall(r"\w+|\s+|[^\w\s]", "\n".join(pydoc_data.topics.topics.values()))
    common = [word for word, _ in collections.Counter(words).most_common(vocabulary - 1)]
    ids = {word: i for i, word in enumerate(common, start=1)}
    tokens = jnp.array([ids.get(word, 0) for word in words], jnp.int32)
    return tokens[:-held_out], tokens[-held_out:]


def random_windows(tokens: jax.Array, rng: np.random.Generator, count: int, length: int) -> jax.Array:
    """(B, T + 1): windows of ``length`` words and the word after each."""
    start = rng.integers(tokens.size - length - 1, size=(count, 1))
    return tokens[start + np.arange(length + 1)]
