"""How the thread blocks of a cluster share a row, for `pallas_mosaic_gpu`, and where a block keeps its part of it."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxkd.kernels.cluster_reduce import PARTS
from jaxkd.kernels.thread_values import STEP, columns_of, load

# Knobs.
ALIGNMENT = 32  # columns: bulk copies are multiples of 128 bytes
MULTIPROCESSOR_MEMORY = 228 * 1024  # shared memory of all its blocks together, on Hopper
BESIDE_LOGITS = 6 * 1024  # bytes of it for a block: the exchanges, the barriers and CUDA's own
# How many steps registers hold, at least and at most, so that as many blocks fit a multiprocessor. Blocks of other rows
# hide what one waits for, and what is held is worked on while the rest is copied; but registers limit blocks too.
HELD = {4: (1, 1), 3: (2, 2), 2: (2, 5), 1: (0, 0)}
COPIES = 2  # of a part: the first can be worked on while the second comes


class Parts(NamedTuple):
    """A row in `PARTS`, each in steps. The last part has what the others leave of the row."""

    width: int  # of the row
    num_tokens: int  # of its columns, the first ones; the others, fewer than `ALIGNMENT`, are filling
    columns: int
    last_columns: int
    num_steps: int  # of a part
    held: int  # of these, the first ones: they stay in registers

    @classmethod
    def of(cls, width: int, num_heads: int, num_tokens: int | None = None) -> "Parts":
        columns = -(-width // (PARTS * ALIGNMENT)) * ALIGNMENT
        last_columns, num_steps = width - (PARTS - 1) * columns, -(-columns // STEP)
        most_of_all = max(last_columns // STEP - 1, 0)  # some of each part is copied
        held = 0
        for blocks, (least, most) in HELD.items():
            room = (MULTIPROCESSOR_MEMORY // blocks - BESIDE_LOGITS) // (4 * num_heads * STEP)
            if num_steps - room <= min(most, most_of_all):
                held = min(max(num_steps - room, least), most_of_all)
                break
        return cls(width, num_tokens or width, columns, last_columns, num_steps, held)

    @property
    def memory_columns(self) -> int:
        """Of shared memory, for each head."""
        return (self.num_steps - self.held) * STEP

    def copies(self, columns: int) -> list[tuple[int, int, int]]:
        """The steps of each copy to shared memory, from and to, and its columns, of a part of ``columns``."""
        steps = self.num_steps - self.held
        number = COPIES if steps >= 2 * COPIES else 1  # none begins beyond the last part
        bounds = [self.held + steps * i // number for i in range(number + 1)]
        return [(a, b, min(columns, b * STEP) - a * STEP) for a, b in itertools.pairwise(bounds)]


# Device code.


class Row:
    """The part of a row that a block has."""

    def __init__(self, parts: Parts):
        self.parts, self.index, self.part = parts, jax.lax.axis_index("row"), jax.lax.axis_index("part")
        self.is_last = self.part == PARTS - 1
        self.columns = jnp.where(self.is_last, parts.last_columns, parts.columns)
        self.start = self.part * parts.columns
        self.offset = self.index * parts.width + self.start

    def of_each_width(self, function: Callable[[int], Any]) -> None:
        """``function`` of the columns that the part has: copies have a static size."""
        pl.when(self.is_last)(lambda: function(self.parts.last_columns))
        pl.when(~self.is_last)(lambda: function(self.parts.columns))

    def is_token(self, step: jax.Array | int) -> jax.Array:
        filling = self.parts.width - self.parts.num_tokens
        return columns_of(step * STEP) < self.columns - jnp.where(self.is_last, filling, 0)

    def loop(self, first: int, end: int, body: Callable[..., Any], carry: Any) -> Any:
        return jax.lax.fori_loop(jnp.int32(first), jnp.int32(end), body, carry)

    def sweep(self, body: Callable[..., Any], carry: Any) -> Any:
        """``body(step, carry)`` of all steps: those that are held are unrolled."""
        for step in range(self.parts.held):
            carry = body(step, carry)
        return self.loop(self.parts.held, self.parts.num_steps, body, carry)


class Logits:
    """A part of one model's logits: the first steps in registers, the others in shared memory."""

    def __init__(self, row: Row, source: Any, memory: Any):
        self.row, self.parts, self.source, self.memory = row, row.parts, source, memory
        self.held: list[jax.Array] = []

    def copy_in(self, copy: int, columns: int, arrived: Any) -> None:
        first, _, size = self.parts.copies(columns)[copy]
        # A promise that holds, and that makes it one bulk copy of any length.
        in_bounds = plgpu.OOBFillMode.PROMISE_IN_BOUNDS
        here = self.source.at[pl.ds(self.row.offset + first * STEP, size)]
        plgpu.copy_gmem_to_smem(here, self.memory.at[pl.ds(self._place(first), size)], arrived, oob_mode=in_bounds)

    def hold(self) -> None:
        self.held = [load(self.source, self.row.offset + step * STEP) for step in range(self.parts.held)]

    def fill(self) -> None:
        """What no token fills is -inf, where every term is 0: no pass needs a mask."""
        last_tokens = self.parts.last_columns - (self.parts.width - self.parts.num_tokens)
        for step in range(last_tokens // STEP, self.parts.num_steps):
            self.replace(step, jnp.where(self.row.is_token(step), self.read(step), -jnp.inf))

    def read(self, step: jax.Array | int) -> jax.Array:
        """A step that is held is given as a Python number."""
        if isinstance(step, int) and step < self.parts.held:
            return self.held[step]
        return load(self.memory, self._place(step))

    def replace(self, step: jax.Array | int, values: jax.Array) -> None:
        """What is put in the place of logits has the same threads to read it: no barrier is needed."""
        if isinstance(step, int) and step < self.parts.held:
            self.held[step] = values
        else:
            self.memory[pl.ds(self._place(step), STEP)] = values

    def _place(self, step: jax.Array | int) -> jax.Array | int:
        return (step - self.parts.held) * STEP
