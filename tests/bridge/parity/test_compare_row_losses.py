"""The comparisons of row losses, log-probabilities and hidden states: within their bounds, and not if wrong."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from comparison_params import by_turns

import jaxkd
from torch_bridge import reference
from torch_bridge.parity.compare_row_losses import comparisons
from torch_bridge.parity.comparison import compare

ALL = comparisons()


def test_every_loss_in_both_types():
    settings = {(case.loss, case.setting) for case in ALL}
    assert len({str(case) for case in ALL}) == len(ALL) == 2 * len(settings)
    chosen = [case.values[0] for case in by_turns(ALL) if not case.marks]
    assert sorted(case.loss for case in chosen) == sorted({loss for loss, _ in settings})
    assert {case.dtype for case in chosen} == {"float32", "bfloat16"}


@pytest.mark.parametrize("comparison", by_turns(ALL))
def test_comparison(comparison):
    result = compare(comparison)
    assert result.passed, result


def test_a_wrong_twin_fails():
    case = next(case for case in ALL if str(case) == "mse, weights, float32")
    larger = compare(case._replace(torch_loss=lambda inputs: case.torch_loss(inputs) * 1.0001))
    elsewhere = case._replace(torch_loss=lambda inputs: case.torch_loss({k: 1.01 * x for k, x in inputs.items()}))
    for result in (larger, compare(elsewhere)):
        assert result.exception is None
        assert result.verdict == "FAIL"


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
