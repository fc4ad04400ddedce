"""One process of two, with one CPU device each. `test_sharding.py` starts both: a port for them to meet, and 0 or 1."""

import sys

import cases
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxkd

ROWS, D, D_TEACHER, V = 12, 8, 6, 30


def loss_and_gradient(*arrays, sharding=None):
    def loss(student, teacher, labels):
        return jaxkd.distillation_loss(student, teacher, labels, hard_weight=0.5, chunk_size=2, sharding=sharding)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(*arrays)


def split(x, mesh, spec):
    """An array of both processes, of which each one gives its part."""
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda index: x[index])


def main(port, number):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=number)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    student = cases.head(0, ROWS, D, V).astype(jnp.float32)
    teacher = cases.head(1, ROWS, D_TEACHER, V).astype(jnp.float32)
    labels = cases.some_labels(2, ROWS, V)

    (want, _), want_gradient = loss_and_gradient(student, teacher, labels)
    for rows, vocabulary in (("x", ()), ((), "x"), ("x", "x")):
        by_row, by_column = P(rows or None), P(vocabulary or None)
        sources = [
            jaxkd.LinearLogits(split(x.hidden, mesh, by_row), split(x.weight, mesh, by_column))
            for x in (student, teacher)
        ]
        sharding = jaxkd.Sharding(rows, vocabulary, mesh)
        (loss, metrics), gradient = loss_and_gradient(*sources, split(labels, mesh, by_row), sharding=sharding)
        np.testing.assert_allclose(loss, want, rtol=1e-5)
        assert metrics["num_rows"] == (labels != -100).sum()
        for name in ("hidden", "weight"):
            for shard in getattr(gradient, name).addressable_shards:
                whole = np.asarray(getattr(want_gradient, name))
                np.testing.assert_allclose(shard.data, whole[shard.index], atol=1e-5 * np.abs(whole).max())
        print("equal", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
