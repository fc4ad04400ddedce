"""What `help()` and `repr()` say of public names: names and shapes instead of unions, addresses and numbers."""

import inspect
from types import GenericAlias

import jax
import jax.numpy as jnp
import pytest

import jaxkd
from jaxkd import embedding, preference

CALLABLE = {
    f"{module.__name__}.{name}": x
    for module in (jaxkd, embedding, preference)
    for name, x in vars(module).items()
    if not name.startswith("_") and callable(x) and not isinstance(x, GenericAlias)
}
HEAD = jaxkd.LinearLogits(jnp.ones((2, 3)), jnp.ones((5, 3)))
IDS = jnp.array([0, 1])


@pytest.mark.parametrize("name", CALLABLE)
def test_a_signature_is_readable(name):
    signature = str(inspect.signature(CALLABLE[name]))
    assert " at 0x" not in signature
    assert "numpy.ndarray" not in signature, "ArrayLike in full; import annotations from __future__"


@pytest.mark.parametrize(
    "text",
    [
        *("forward_kl", "reverse_kl", "total_variation", "hellinger", "overlap_nll", "cosine_distance", "mse"),
        *("earth_mover", "jensen_shannon(beta=0.25)", "symmetric_kl(weight=0.5)", "skew_kl(alpha=0.1)"),
        *("alpha_divergence(alpha=0.5)", "alpha_beta(alpha=0.3, beta=0.6)", "renyi(alpha=0.5)"),
        *("embedding.euclidean", "embedding.cosine", "preference.k1", "preference.bias_corrected(preference.k3)"),
    ],
)
def test_an_object_is_shown_as_it_is_written(text):
    shown = repr(eval(f"jaxkd.{text}".replace("(preference", "(jaxkd.preference")))
    assert shown == text.replace("embedding.", "").replace("preference.", "")


def chi_squared_term(log_p, log_q):
    return jnp.exp(log_q) * jnp.expm1(log_p - log_q) ** 2


def cube(x):
    return x**3


def test_what_a_user_made_shows_its_functions():
    own = jaxkd.Divergence(chi_squared_term)
    assert repr(own) == "Divergence(term=chi_squared_term, parameters=(), is_nonnegative=False)"
    assert repr(preference.KLEstimate(cube)) == "KLEstimate(cube)"
    assert repr(embedding.Distance(chi_squared_term, cube)) == "Distance(between=chi_squared_term, order=cube)"
    rows = jaxkd.kernel_distance(jnp.ones((4, 2)))
    assert "function=_linear_kernel, parameters=(float32[4,2],)" in repr(rows)


def test_a_traced_parameter_is_shown_by_its_shape():
    shown = []
    jax.jit(lambda beta: shown.append(repr(jaxkd.jensen_shannon(beta))))(0.3)
    assert shown == ["jensen_shannon(beta=float32[])"]


@pytest.mark.parametrize(
    ("teacher", "shown"),
    [
        (jaxkd.TopKLogProbs(jnp.ones((2, 4)), jnp.ones((2, 4), int)), "log_probs=float32[2,4], token_ids=int32[2,4]"),
        (jaxkd.Mixture([HEAD, HEAD], jnp.ones(2)), "weights=float32[2]"),
        (jaxkd.Routed([HEAD, HEAD], IDS), "index=int32[2]"),
        (jaxkd.VocabularyMap(HEAD, IDS, IDS), "student_ids=int32[2], teacher_ids=int32[2]"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_a_teacher_shows_shapes(teacher, shown):
    assert shown in repr(teacher)
    if type(teacher) is not jaxkd.TopKLogProbs:
        assert repr(HEAD) in repr(teacher)
    assert "Array(" not in repr(teacher)
    assert "Sharding(rows='data'" in repr(jaxkd.Sharding("data"))
