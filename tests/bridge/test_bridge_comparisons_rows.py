"""The comparisons of row losses, log-probabilities and hidden states: within their bounds, and not if wrong."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jaxkd
from torch_bridge import reference
from torch_bridge.comparison import GRADIENT_BOUNDS, LOSS_BOUND, compare
from torch_bridge.comparisons_rows import comparisons

ALL = comparisons()
# Every loss once, by turns in float32 and bfloat16; the command compares all.
SOME = {f"{case.loss}, {case.setting}": case for case in ALL}
HALF = {name: ALL[i + i % 2 * len(SOME)] for i, name in enumerate(SOME)}


def within_bounds(comparison):
    found = compare(comparison)
    bounds = {name: LOSS_BOUND if name == "loss" else GRADIENT_BOUNDS[comparison.dtype] for name in found}
    return all(found[name] <= bounds[name] for name in found)  # a NaN is not


def test_every_loss_in_both_types():
    assert len({(case.loss, case.setting, case.dtype) for case in ALL}) == len(ALL) == 2 * len(SOME)
    assert [f"{case.loss}, {case.setting}" for case in HALF.values()] == list(SOME)
    assert {case.dtype for case in HALF.values()} == {"float32", "bfloat16"}


@pytest.mark.parametrize("name", HALF)
def test_comparison(name):
    assert within_bounds(HALF[name])


def test_a_wrong_twin_fails():
    case = SOME["mse, weights"]
    assert not within_bounds(case._replace(torch_loss=lambda inputs: case.torch_loss(inputs) * 1.0001))
    doubled = case._replace(torch_loss=lambda inputs: case.torch_loss({k: 1.01 * x for k, x in inputs.items()}))
    assert not within_bounds(doubled)


def test_twins_by_hand():
    p, q = (torch.tensor([x], dtype=torch.float64).log() for x in ([0.5, 0.3, 0.2], [0.1, 0.9]))
    torch.testing.assert_close(reference.earth_mover.function(p, q), torch.tensor([0.4], dtype=torch.float64))
    z = torch.tensor([[3.0, 4.0], [4.0, 3.0]], dtype=torch.float64)
    torch.testing.assert_close(reference.cosine_distance.function(z[:1], z[1:]), torch.tensor([0.04]).double())
    torch.testing.assert_close(reference.mse.function(z[:1], z[1:]), torch.tensor([1.0]).double())
    half, quarter = (torch.tensor([x], dtype=torch.float64).log() for x in ([0.5, 0.5], [0.25, 0.75]))
    points = torch.tensor([[1.0, 0.0], [1.0, 2.0]], dtype=torch.float64)
    values = {
        0.125: reference.kernel_distance(),
        0.25: reference.kernel_distance(points),
        2.0: reference.kernel_distance(points, degree=2),
    }
    for value, distance in values.items():
        torch.testing.assert_close(distance.function(half, quarter), torch.tensor([value]).double())
    far = reference.sinkhorn(torch.eye(2), epsilon=0.05).function(100 * torch.eye(2)[:1], 100 * torch.eye(2)[1:])
    torch.testing.assert_close(far, torch.ones(1))
    scores = reference.Logits(torch.tensor([[[0.0, 1.0], [2.0, 0.0]]], dtype=torch.float64))
    labels = torch.tensor([[1, -100]])
    expected = torch.tensor([-0.3132616875182228]).double()  # log sigmoid(1)
    torch.testing.assert_close(reference.sequence_log_probs(scores, labels), expected)


def test_statistics():
    generator = torch.Generator().manual_seed(0)
    z, z_teacher = torch.randn(2, 5, 4, 31, generator=generator)
    labels = torch.randint(31, (5, 4), generator=generator)
    got = jaxkd.token_statistics(
        jaxkd.Logits(jnp.asarray(z.numpy())), labels.numpy(), jaxkd.Logits(jnp.asarray(z_teacher.numpy())), chunk_size=3
    )
    want = reference.token_statistics(reference.Logits(z.double()), labels, reference.Logits(z_teacher.double()))
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value.numpy(), rtol=1e-5, atol=1e-6, err_msg=name)
