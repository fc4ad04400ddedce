"""The embedding losses in both libraries: within their bounds, and a twin that is wrong is told apart."""

import pytest
from comparison_params import by_turns

from torch_bridge.parity.compare_embedding import comparisons
from torch_bridge.parity.comparison import GRADIENT_BOUNDS, compare

COMPARISONS = comparisons()
WHOLE = [comparison for comparison in COMPARISONS if comparison.dtype == "float32" and "(" not in comparison.loss]


@pytest.mark.parametrize("comparison", by_turns(COMPARISONS))
def test_comparison(comparison):
    result = compare(comparison)
    assert result.passed, result


@pytest.mark.parametrize(
    "comparison", [x for x in COMPARISONS if x.dtype == "float32" and "(" not in x.loss][::2], ids=str
)
def test_a_wrong_twin_fails(comparison):
    """A thousandth of the inputs' own sum of squares added: gradients are far beyond their bounds."""

    def wrong(inputs):
        return comparison.torch_loss(inputs) + 1e-3 * sum(x.square().mean() for x in inputs.values())

    assert compare(comparison._replace(torch_loss=wrong)).worst_gradient > 5 * GRADIENT_BOUNDS["float32"]
