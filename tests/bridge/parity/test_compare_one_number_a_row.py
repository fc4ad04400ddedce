"""Cross-entropy and numbers of rows in both libraries: within their bounds, and a twin that is wrong is told apart."""

import pytest
from comparison_params import by_turns

from torch_bridge import reference
from torch_bridge.parity.compare_one_number_a_row import comparisons
from torch_bridge.parity.comparison import compare

ALL = comparisons()
FLOAT32 = [case for case in ALL if case.dtype == "float32"]


@pytest.mark.parametrize("comparison", by_turns(ALL))
def test_comparison(comparison):
    result = compare(comparison)
    assert result.passed, result


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", [None, "xla", "triton", "mosaic"])
def test_errors_are_within_their_bounds_on_a_gpu(implementation):
    """A kernel runs the rows that are for it, and refuses the others."""
    results = [compare(case) for case in comparisons("cuda", implementation)]
    assert [x for x in results if x.verdict == "FAIL"] == []
    assert "pass" in {x.verdict for x in results}


WRONG = {
    "no smoothing": ("cross_entropy", "smoothing, NaN states", {"label_smoothing": 0.0}),
    "more smoothing": ("cross_entropy", "smoothing, NaN states", {"label_smoothing": 0.101}),
    "no z-loss": ("cross_entropy", "z-loss, weights", {"z_loss": 0.0}),
    "another temperature": ("token_log_probs", "V 1024, tau 0.7", {"temperature": 0.71}),
    "entropy of untempered logits": ("token_entropies", "V 509, tau 2", {"temperature": 1.0}),
    "mean instead of sum": ("sequence_log_probs", "sum", {"average": True}),
    "another divergence": ("token_divergences", "mask", {"divergence": reference.reverse_kl}),
    "every row": ("token_divergences", "mask", {"mask": None}),
}


@pytest.mark.parametrize(("name", "setting", "changes"), WRONG.values(), ids=list(WRONG))
def test_a_wrong_twin_fails(name, setting, changes, monkeypatch):
    case = next(x for x in FLOAT32 if x.loss.startswith(name) and x.setting == setting)
    whole = getattr(reference, name)
    monkeypatch.setattr(reference, name, lambda *arguments, **options: whole(*arguments, **options | changes))
    result = compare(case)
    assert result.exception is None
    assert result.verdict == "FAIL"
