"""Preference losses with answers over eight virtual CPU devices, held to one device; axes of type Auto and Explicit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from preference_cases import CASES, ONE_OF_EACH_KIND, cast, evaluate_all
from quick_programs import QUICK

WEIGHTS = np.array([1.0, 0.0, 2.0, 0.5, 0.0, 1.5, 1.0, 1.0])
NAMES = (*ONE_OF_EACH_KIND, "aot_unpaired")


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        pytest.param(AxisType.Auto, NAMES[::2], id="Auto"),
        pytest.param(AxisType.Explicit, NAMES[1::2], id="Explicit"),
        pytest.param(AxisType.Auto, NAMES[1::2], id="Auto, the others", marks=pytest.mark.slow),
        pytest.param(AxisType.Explicit, NAMES[::2], id="Explicit, the others", marks=pytest.mark.slow),
    ],
)
def test_over_devices(kind, names):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,), devices=jax.devices("cpu")[:8])

    def split(x):
        return jax.device_put(x, NamedSharding(mesh, P("data")))

    def evaluate(inputs, weights):
        return {name: CASES[name].evaluate(x, weights=weights) for name, x in inputs.items()}

    with jax.set_mesh(mesh):
        inputs = jax.tree.map(split, {name: cast(CASES[name].inputs) for name in names})
        results = jax.device_get(jax.jit(evaluate, compiler_options=QUICK)(inputs, split(jnp.float32(WEIGHTS))))
    for name, want in evaluate_all({name: CASES[name].inputs for name in names}, WEIGHTS).items():
        jax.tree.map(
            lambda x, y, name=name: np.testing.assert_allclose(x, y, 1e-4, 1e-6, err_msg=name), results[name], want
        )
