"""More than one device: what cannot be split is refused, and what needs processes of its own."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxkd

ROOT = Path(__file__).parents[2]
EIGHT_DEVICES = "--xla_force_host_platform_device_count=8"


def start(arguments, flags):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    inherited = re.sub(r"--xla_force_host\S*", "", os.environ.get("XLA_FLAGS", ""))  # examples set it when imported
    path = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH"))))
    environment |= {
        "XLA_FLAGS": f"{inherited} {flags}".strip(),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": path,
    }
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finish(process):
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


def test_two_processes():
    """Each with a device of its own and half of the rows; then with half of the vocabulary."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [start(["tests/loop/one_of_two_processes.py", str(port), str(i)], "") for i in range(2)]
    for output in [finish(process) for process in processes]:
        assert output.count("equal") == 3


@pytest.mark.slow
def test_example():
    pytest.importorskip("flax")
    output = finish(start(["-m", "examples.distill_sharded", "--steps", "3"], EIGHT_DEVICES))
    assert float(re.search(r"Largest difference of 3 losses: (\S+)", output)[1]) < 1e-5
    alone, on_mesh = (float(x) for x in re.search(r"MiB a device +(\S+) +(\S+)", output).groups())
    assert on_mesh < 0.75 * alone


def mesh(*names):
    return jax.make_mesh((1,) * len(names), names, axis_types=(AxisType.Auto,) * len(names), devices=jax.devices()[:1])


HEAD = jaxkd.LinearLogits(jnp.ones((4, 3)), jnp.ones((5, 3)))

# What is wrong, the error, and what its message has to hold.
BAD = {
    "no_such_axis": (jaxkd.Sharding("batch", mesh=mesh("data")), ValueError, ["`sharding.rows`", "'batch'", "data"]),
    "no_such_vocabulary_axis": (
        jaxkd.Sharding("data", ("data", "model"), mesh("data")),
        ValueError,
        ["`sharding.vocabulary`", "'model'"],
    ),
    "no_mesh": (jaxkd.Sharding("data"), ValueError, ["no mesh", "jax.set_mesh"]),
    "axis_twice": (jaxkd.Sharding(P(("data", "data")), mesh=mesh("data")), ValueError, ["`sharding.rows`", "once"]),
    "too_many_axes": (jaxkd.Sharding(P("x", "y"), mesh=mesh("x", "y")), ValueError, ["2 axes", "there are 1"]),
    "no_name": (jaxkd.Sharding(vocabulary=(0,), mesh=mesh("data")), TypeError, ["`sharding.vocabulary`", "names"]),
    "no_sharding": (P("data"), TypeError, ["`sharding`", "jaxkd.Sharding"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_sharding(name):
    sharding, error, words = BAD[name]
    with pytest.raises(error) as caught:
        jaxkd.distillation_loss(HEAD, HEAD, sharding=sharding)
    assert all(word in str(caught.value) for word in words), caught.value


def test_logits_are_not_gathered():
    logits = jaxkd.Logits(jnp.ones((4, 5)))
    wide = jax.sharding.AbstractMesh((2,), ("x",))
    with pytest.raises(ValueError, match=r"`student` is Logits, .*'x'.*`sharding.vocabulary`"):
        jaxkd.distillation_loss(logits, HEAD, sharding=jaxkd.Sharding("x", "x", wide))


WHOLE_ROWS = {
    "this `divergence`": lambda **options: jaxkd.distillation_loss(
        HEAD, HEAD, divergence=jaxkd.cosine_distance, **options
    ),
    "a Mixture as `teacher`": lambda **options: jaxkd.distillation_loss(HEAD, jaxkd.Mixture([HEAD]), **options),
    "`function`": lambda **options: jaxkd.chunked_loss(lambda z, *_: z[:, 0], HEAD, **options),
}


@pytest.mark.parametrize("what", WHOLE_ROWS)
def test_whole_rows_are_not_split(what):
    with pytest.raises(ValueError, match=f"{what} needs whole rows of logits; leave `vocabulary` out"):
        WHOLE_ROWS[what](sharding=jaxkd.Sharding((), "x", mesh("x")))


@pytest.mark.parametrize(("rows", "vocabulary", "has_kernel"), [("x", (), True), ((), "x", False)])
def test_a_kernel_runs_where_rows_are_split(rows, vocabulary, has_kernel):
    """Lowered for two GPUs, as a mesh in context names them."""
    gpu = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
    two = jax.sharding.AbstractMesh((2,), ("x",), (AxisType.Auto,), abstract_device=gpu)
    head = jaxkd.LinearLogits(*(jax.ShapeDtypeStruct((size, 64), jnp.bfloat16) for size in (256, 2048)))

    def loss(student, teacher):
        return jaxkd.distillation_loss(student, teacher, sharding=jaxkd.Sharding(rows, vocabulary))[0]

    with jax.sharding.use_abstract_mesh(two):
        text = jax.jit(jax.value_and_grad(loss)).trace(head, head).lower(lowering_platforms=("cuda",)).as_text()
    assert ("jaxkd_rows" in text or "mosaic_gpu" in text) == has_kernel


@pytest.mark.parametrize("implementation", ["triton", "mosaic"])
def test_kernels_say_why_they_cannot_split_a_vocabulary(implementation):
    wide = jax.sharding.AbstractMesh((2,), ("x",), abstract_device=jax.sharding.AbstractDevice("H100", 132, "cuda"))
    with jax.sharding.use_abstract_mesh(wide), pytest.raises(ValueError, match=rf"{implementation}.*(share|jax)"):
        jaxkd.distillation_loss(HEAD, HEAD, sharding=jaxkd.Sharding((), "x"), implementation=implementation)


def test_a_mesh_that_is_not_manual():
    def loss(hidden):
        student = jaxkd.LinearLogits(hidden, HEAD.weight)
        return jaxkd.distillation_loss(student, student, sharding=jaxkd.Sharding("x", "y"))[0]

    mapped = jax.shard_map(loss, mesh=mesh("x", "y"), in_specs=P("x"), out_specs=P(), axis_names={"x"})
    with pytest.raises(ValueError, match="'y', which is not manual in this shard_map as 'x' is"):
        jax.jit(mapped)(HEAD.hidden)


def test_one_device_is_a_mesh_too():
    """The mesh of one device, the mesh in context, and none give the same bits, outside of jit as well."""
    teacher = jaxkd.LinearLogits(HEAD.hidden, jnp.arange(15.0).reshape(5, 3) / 5)
    want, _ = jaxkd.distillation_loss(HEAD, teacher)
    got, _ = jaxkd.distillation_loss(HEAD, teacher, sharding=jaxkd.Sharding("x", "y", mesh("x", "y")))
    with jax.set_mesh(mesh("x", "y")):
        in_context, _ = jaxkd.distillation_loss(HEAD, teacher, sharding=jaxkd.Sharding("x", "x"))
    np.testing.assert_allclose([got, in_context], want, rtol=1e-6)
