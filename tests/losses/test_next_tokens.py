"""`shift_labels`: the token that comes next; and what is said of labels that do not fit."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkd

TOKENS = jnp.array([[5, 6, 7, 8], [5, 9, 0, 0]])
MASK = jnp.array([[0, 0, 1, 1], [0, 1, 0, 0]])
WANT = [[6, 7, 8, -100], [9, 0, 0, -100]]
WANT_OF_MASK = [[-100, 7, 8, -100], [9, -100, -100, -100]]


def test_values():
    np.testing.assert_array_equal(jaxkd.shift_labels(TOKENS), WANT)
    for mask in (MASK, MASK == 1, MASK.astype(jnp.float32), np.asarray(MASK)):
        np.testing.assert_array_equal(jaxkd.shift_labels(TOKENS, mask), WANT_OF_MASK)
    np.testing.assert_array_equal(jaxkd.shift_labels(TOKENS[0], ignore_index=0), [6, 7, 8, 0])
    np.testing.assert_array_equal(jax.jit(jaxkd.shift_labels)(TOKENS, MASK), WANT_OF_MASK)


@pytest.mark.parametrize("shape", [(0,), (1,), (2, 0), (3, 1), (2, 3, 4)])
def test_shapes(shape):
    labels = jaxkd.shift_labels(jnp.ones(shape, jnp.int32))
    assert labels.shape == shape
    assert np.all(np.asarray(labels)[..., -1:] == -100)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.uint32, np.int32])
def test_types(dtype):
    """A type that has no -100, or not every token, does not stay."""
    labels = jaxkd.shift_labels(np.array([1, 2, 3], dtype))
    assert labels.dtype == jnp.int32
    np.testing.assert_array_equal(labels, [2, 3, -100])


def test_the_log_probability_of_a_sequence():
    """log p(tokens 1.. | those before), by hand: position t predicts the token at t + 1."""
    z = np.random.default_rng(0).normal(size=(2, 4, 11)).astype(np.float32)
    log_q = np.asarray(jax.nn.log_softmax(z))
    want = [sum(log_q[b, t, TOKENS[b, t + 1]] for t in range(3)) for b in range(2)]
    got = jaxkd.sequence_log_probs(jaxkd.Logits(jnp.asarray(z)), jaxkd.shift_labels(TOKENS))
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((jnp.ones((2, 3)),), TypeError, "`tokens` is float32; give integer token ids"),
        ((TOKENS > 0,), TypeError, "`tokens` is bool"),
        ((jnp.int32(3),), ValueError, "`tokens` is a scalar"),
        ((TOKENS, MASK[0]), ValueError, r"`mask` has shape \(4,\) but `tokens` has \(2, 4\)"),
        ((TOKENS, MASK[:, 1:]), ValueError, r"`mask` has shape \(2, 3\)"),
        ((TOKENS, None, 0.5), TypeError, "`ignore_index` is 0.5"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        jaxkd.shift_labels(*arguments)


class Tensor:
    """What is no array of JAX or NumPy, from a package of its name."""

    shape, ndim, dtype = (7,), 1, "torch.int64"


Tensor.__module__ = "torch"
STUDENT = cases.head(0, 7, 4, 11).astype(jnp.float32)
LABELS = {
    "torch": (Tensor(), TypeError, r"`labels` is a torch\.Tensor; give a JAX array"),
    "bool": (np.ones(7, bool), TypeError, r"`labels` is bool; give integer token ids; a mask of rows"),
    "float": (np.ones(7, np.float32), TypeError, "`labels` is float32; give integer token ids"),
    "column": (np.ones((7, 1), int), ValueError, r"`labels` has shape \(7, 1\).*\(7,\); take the last axis off"),
    "one more": (np.ones(8, int), ValueError, r"`labels` has shape \(8,\).*\(7,\); give one label a row"),
    "one fewer": (np.ones(6, int), ValueError, r"\(6,\).*\(7,\); give one label a row, as jaxkd\.shift_labels"),
    "text": ("tokens", TypeError, "`labels` is a str; give an array"),
}


def first_logit(logits, labels, per_row, shared):
    return logits[:, 0]


CALLS = {
    "chunked_loss": lambda labels: jaxkd.chunked_loss(first_logit, STUDENT, labels),
    "chunked_rows": lambda labels: jaxkd.chunked_rows(first_logit, STUDENT, labels),
    "cross_entropy": lambda labels: jaxkd.cross_entropy(STUDENT, labels),
    "distillation_loss": lambda labels: jaxkd.distillation_loss(STUDENT, STUDENT, labels),
    "hidden_mse": lambda labels: jaxkd.hidden_mse(STUDENT.hidden, STUDENT.hidden, labels),
    "token_divergences": lambda labels: jaxkd.token_divergences(STUDENT, STUDENT, labels),
    "token_log_probs": lambda labels: jaxkd.token_log_probs(STUDENT, labels),
}


@pytest.mark.filterwarnings("ignore::beartype.roar.BeartypeWarning")
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("case", LABELS)
def test_labels_that_do_not_fit(case, call):
    labels, error, message = LABELS[case]
    with pytest.raises(error, match=message):
        CALLS[call](labels)


@pytest.mark.parametrize("where", ["per_row", "shared"])
def test_what_is_no_array(where):
    with pytest.raises(TypeError, match=rf"`{where}\['a'\]` is a torch\.Tensor"):
        jaxkd.chunked_loss(first_logit, STUDENT, **{where: {"a": Tensor()}})
