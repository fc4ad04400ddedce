"""`python -m jaxkd.doctor`: what runs here and what does not, how exact and how fast it is, and what to do about it.

Takes half a minute on a CPU, and no memory to speak of. Exit status: 0, or 1 where a loss is wrong or fails.
"""

import argparse
import os
import platform
import shutil
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import metadata, util
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxkd
from jaxkd.kernels import Chunk
from jaxkd.kernels.dispatch import KERNELS, fastest, obstacle
from jaxkd.loop import rows_of_chunk
from jaxkd.loop.platform import target_device, target_platform

# Of errors relative in L2 where teacher and student are 2 % apart: rounded logits are fifty times as bad there.
BOUNDS = {"float32": 1e-3, "bfloat16": 1e-2}
SECONDS = 3.0  # of the measurement of time, at least
PREALLOCATE = "XLA_PYTHON_CLIENT_PREALLOCATE"


class Problem(NamedTuple):
    """Two heads over one vocabulary."""

    rows: int
    student_hidden: int
    teacher_hidden: int
    vocabulary: int

    def __str__(self) -> str:
        return f"{self.rows} rows, D = {self.student_hidden} and {self.teacher_hidden}, V = {self.vocabulary}"

    def shapes(self, dtype: Any) -> list[jax.ShapeDtypeStruct]:
        """Hidden states and head of the student, then of the teacher."""
        sides = self.student_hidden, self.teacher_hidden
        return [jax.ShapeDtypeStruct((n, d), dtype) for d in sides for n in (self.rows, self.vocabulary)]

    def chunk(self, dtype: Any) -> Chunk:
        student, teacher = _heads(*self.shapes(dtype))
        return Chunk(rows_of_chunk(None, student, teacher).size, self.vocabulary, self.vocabulary, student.dtype)

    def arrays(self, dtype: Any) -> list[jax.Array]:
        """Hidden states of unit variance, heads N(0, 1) / sqrt(D)."""
        keys = jax.random.split(jax.random.key(0), 4)
        values = [jax.random.normal(key, x.shape) for key, x in zip(keys, self.shapes(dtype), strict=True)]
        return [(x if i % 2 == 0 else x / x.shape[1] ** 0.5).astype(dtype) for i, x in enumerate(values)]


LARGE = Problem(8192, 2048, 4096, 128256)  # planned, never run
SMALL = Problem(256, 64, 64, 4096)
TIMED_ON_CPU = Problem(512, 128, 256, 16384)
TIMED_ON_GPU = Problem(2048, 2048, 4096, 128256)


def _heads(*arrays: Any) -> tuple[jaxkd.LinearLogits, jaxkd.LinearLogits]:
    return jaxkd.LinearLogits(*arrays[:2]), jaxkd.LinearLogits(*arrays[2:])


def chunked_loss(*arrays: jax.Array) -> jax.Array:
    return jaxkd.distillation_loss(*_heads(*arrays))[0]


def dense_loss(*arrays: jax.Array) -> jax.Array:
    """The formula as anybody would write it, of all logits in float32."""
    log_q, log_p = (
        jax.nn.log_softmax(jnp.matmul(hidden, head.T, preferred_element_type=jnp.float32))
        for hidden, head in (arrays[:2], arrays[2:])
    )
    return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))


def products(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The four matrix products that the loss and its gradients cannot do without."""
    hidden, head, teacher_hidden, teacher_head = arrays
    product = partial(jnp.matmul, preferred_element_type=jnp.float32)
    d = (product(hidden, head.T) - product(teacher_hidden, teacher_head.T)).astype(hidden.dtype)
    return product(d, head), product(d.T, hidden)


def with_gradients(loss: Callable[..., jax.Array]) -> Any:
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))


# What is found --------------------------------------------------------------------------------------------------------


def version(distribution: str) -> str:
    try:
        return f"{distribution} {metadata.version(distribution)}"
    except metadata.PackageNotFoundError:
        return f"no {distribution}"


def devices() -> Iterator[str]:
    for kind, count in Counter(device.device_kind for device in jax.devices()).items():
        yield f"{count} x {kind}, {_memory_of(next(x for x in jax.devices() if x.device_kind == kind))}"


def _memory_of(device: jax.Device) -> str:
    if device.platform == "cpu":
        return f"{os.cpu_count()} cores, {_size(os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE'))}"
    stats = device.memory_stats() or {}
    return f"{_size(stats['bytes_limit'])} for JAX" if "bytes_limit" in stats else "memory not told"


def implementations(problem: Problem, dtype: Any) -> tuple[str, dict[str, str]]:
    """Which one a call takes, and of each what it can do here."""
    chunk = problem.chunk(dtype)
    reasons = {name: obstacle(name, chunk, jaxkd.forward_kl) for name in KERNELS}
    chosen = fastest(chunk, jaxkd.forward_kl)
    can = {name: f"cannot: {reason}" if reason else "can" for name, reason in reasons.items()} | {"xla": "can"}
    return chosen, can | {chosen: "runs"}


def temporaries(loss: Callable[..., jax.Array], problem: Problem) -> str:
    """As XLA plans them, of the loss with both gradients; nothing is run."""
    compiled = unless_out_of_memory(with_gradients(loss).lower(*problem.shapes(jnp.bfloat16)).compile)
    if compiled is None:
        return "more than there is"
    sizes = compiled.memory_analysis()
    return "not told" if sizes is None else _size(sizes.temp_size_in_bytes)


def errors(problem: Problem, dtype: Any, precision: str | None) -> dict[str, float]:
    """Of the loss and both gradients against float64 NumPy, the teacher being 2 % away from the student."""
    hidden, head, _, noise = problem.arrays(jnp.float32)
    arrays = [x.astype(dtype) for x in (hidden, head, hidden, head + 0.02 * noise)]
    with jax.default_matmul_precision(precision):
        loss, gradients = with_gradients(chunked_loss)(*arrays)
    found = dict(zip(("loss", "hidden gradient", "head gradient"), (loss, *gradients), strict=True))
    exact = dict(zip(found, _in_float64(*(np.asarray(x, np.float64) for x in arrays)), strict=True))
    return {name: _relative(np.asarray(x, np.float64), exact[name]) for name, x in found.items()}


def _in_float64(*arrays: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    hidden, head, teacher_hidden, teacher_head = arrays
    logits = hidden @ head.T, teacher_hidden @ teacher_head.T
    log_q, log_p = (z - np.log(np.sum(np.exp(z), axis=1, keepdims=True)) for z in logits)
    p, q = np.exp(log_p), np.exp(log_q)
    d = (q - p) / len(hidden)
    return np.sum(p * (log_p - log_q)) / len(hidden), d @ head, d.T @ hidden


def _relative(x: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(x - exact) / np.linalg.norm(exact))


def time_loss(problem: Problem, dtype: Any) -> tuple[float, float]:
    """The median seconds of the bare products and of the loss with its gradients, taken in turns."""
    functions, arrays = (jax.jit(products), with_gradients(chunked_loss)), problem.arrays(dtype)
    for function in functions:  # compiles
        jax.block_until_ready(function(*arrays))
    times: list[tuple[float, ...]] = []
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(times) < 3:
        times.append(tuple(_seconds(function, arrays) for function in functions))
    floor, ours = map(statistics.median, zip(*times, strict=True))
    return floor, ours


def _seconds(function: Callable[..., Any], arrays: list[jax.Array]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function(*arrays))
    return time.perf_counter() - start


def unless_out_of_memory(function: Callable[..., Any], *arguments: Any) -> Any:
    """What it returns, or None."""
    try:
        return function(*arguments)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


# What is said ---------------------------------------------------------------------------------------------------------


def advice(is_tf32: bool = False, is_out_of_memory: bool = False) -> Iterator[str]:
    """What to do about what was found, in order of weight."""
    on, is_cuda = target_platform(), target_platform() == "cuda"
    has_nvidia = shutil.which("nvidia-smi") is not None or os.path.exists("/dev/nvidia0")
    if "jaxkd" in metadata.packages_distributions().get("jaxkd", []):
        yield "The package `jaxkd` of PyPI, a nearest-neighbour library, has the same import name: pip uninstall jaxkd"
    if has_nvidia and not is_cuda:
        asked = jax.config.jax_platforms  # type: ignore[attr-defined]
        yield (
            f"There is an NVIDIA GPU, and JAX_PLATFORMS={asked} keeps JAX from it: unset it."
            if asked
            else "There is an NVIDIA GPU, but JAX does not see it: pip install 'jax[cuda13]', "
            "or 'jax[cuda12]' with a driver older than 580."
        )
    if on not in ("cpu", "cuda"):
        yield f"On {on!r} the losses run in XLA. They lower for it; nobody has measured them there."
    if is_cuda and jax.__version_info__ < (0, 11) and any(name in target_device() for name in ("H100", "H200")):
        yield "JAX 0.11 and newer, on Python 3.12, run a faster kernel on this GPU: pip install -U 'jax[cuda13]'"
    if is_tf32:
        yield (
            "float32 products run in TF32 here, with some three digits: bfloat16 inputs do not care; for all digits of "
            'float32 use jax.default_matmul_precision("highest").'
        )
    if is_out_of_memory:
        yield "There was not enough memory to measure the speed: something else may be using the GPU."
    if is_cuda and os.environ.get(PREALLOCATE, "true") != "false" and util.find_spec("torch"):
        yield f"JAX takes 75 % of a GPU's memory when it starts: set {PREALLOCATE}=false where PyTorch is to share it."
    if jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        yield "jax_enable_x64 is on: arrays made of NumPy's float64 stay float64, and run in XLA, not in a kernel."
    if jax.device_count() > 1:
        yield f"There are {jax.device_count()} devices; a loss uses one, unless `sharding` says how arrays are split."


def main(
    arguments: Sequence[str] | None = None,
    large: Problem = LARGE,
    small: Problem = SMALL,
    timed: Problem | None = None,
) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m jaxkd.doctor",
        description="What of jaxkd runs here, how exact and how fast it is, and what to do about it.",
        epilog="Exit status: 0, or 1 where a loss is wrong or fails.",
    )
    parser.parse_args(arguments)
    say = partial(print, flush=True)
    on = target_platform()

    say(f"jaxkd {jaxkd.__version__}")
    say(f"  Python {platform.python_version()}, {', '.join(map(version, ('jax', 'jaxlib', 'flax', 'optax')))}")
    say(f"\nDevices: JAX computes on {on!r}")
    for line in devices():
        say(f"  {line}")

    say(f"\nWhich implementation runs a loss of {large}, bfloat16")
    chosen, can = implementations(large, jnp.bfloat16)
    for name, what in can.items():
        say(f"  {name:7} {what}")

    say("\nMemory of that loss with both gradients beyond its inputs, as XLA plans it; nothing is run")
    for name, loss in (("jaxkd", chunked_loss), ("dense formula", dense_loss)):
        say(f"  {name:14} {temporaries(loss, large)}")

    say(f"\nExactness: forward KL of {small}, models 2 % apart, against float64 NumPy; errors relative in L2")
    is_right = True
    for dtype, bound in BOUNDS.items():
        found = errors(small, dtype, precision="highest")
        is_fine = all(error <= bound for error in found.values())  # NaN is not
        shown = ", ".join(f"{name} {error:.1e}" for name, error in found.items())
        say(f"  {dtype:9} {shown}: {'right' if is_fine else 'WRONG'}, the bound is {bound:.0e}")
        is_right &= is_fine
    is_tf32 = max(errors(small, "float32", precision=None).values()) > BOUNDS["float32"]

    timed = timed or (TIMED_ON_CPU if on == "cpu" else TIMED_ON_GPU)
    dtype = "float32" if on == "cpu" else "bfloat16"
    say(f"\nSpeed: forward KL with both gradients of {timed}, {dtype}, by {implementations(timed, dtype)[0]}")
    times = unless_out_of_memory(time_loss, timed, dtype)
    if times is not None:
        floor, ours = (1e3 * x for x in times)
        say(f"  the four matrix products alone {floor:.1f} ms, jaxkd {ours:.1f} ms: {ours / floor:.2f} times as long")

    say("\nAdvice")
    if not is_right:
        say(f"  * A loss is wrong. Please report all of this; `implementation={chosen!r}` is the first suspect.")
    for line in [*advice(is_tf32, is_out_of_memory=times is None)] or ["Nothing to mend."]:
        say(f"  * {line}")
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
