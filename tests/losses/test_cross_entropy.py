"""The cross-entropy of one head: float64 NumPy, numbers worked by hand, optax, masks, special logits, rounding."""

import math
from functools import partial

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import row_cases

import jaxkd
from jaxkd.loop import chunk_size as chunk_sizes

ln = math.log
N, D, V, CHUNK = 23, 12, 123, 8
STUDENT = cases.head(0, N, D, V, bias=True, scale=0.7, softcap=8.0)
LABELS = cases.some_labels(2, N, V)
COUNTED = LABELS != -100
WEIGHTS = np.random.default_rng(4).uniform(0.2, 2, size=N).astype(np.float32)
PLAIN = {"label_smoothing": 0.0, "z_loss": 0.0, "weights": np.ones(N, np.float32)}
BOTH = PLAIN | {"label_smoothing": 0.15, "z_loss": 0.03}


@partial(jax.jit, static_argnames=("ignore_index", "chunk_size"))
def value_and_grad(student, labels, ignore_index=-100, chunk_size=CHUNK, **numbers):
    """With every number traced: one program for the calls of a type and of shapes."""
    return jax.value_and_grad(jaxkd.cross_entropy, has_aux=True)(
        student, labels, ignore_index=ignore_index, chunk_size=chunk_size, **numbers
    )


def run(student=STUDENT, labels=LABELS, dtype=jnp.float32, **options):
    return value_and_grad(student.astype(dtype), labels, **PLAIN | options)


def compare(student, labels=LABELS, *, loss=3e-6, gradient=1e-5, **options):
    result = value_and_grad(student, labels, **PLAIN | options)
    options.pop("chunk_size", None)
    truth = row_cases.cross_entropy(row_cases.twin(student), labels, **options)
    row_cases.check_cross_entropy(result, truth, loss=loss, gradient=gradient)
    return result


def assert_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


SETTINGS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "uniform": {"label_smoothing": 1.0},
    "z-loss": {"z_loss": 0.1},
    "both": BOTH,
    "weights": BOTH | {"weights": WEIGHTS},
    "normalizer": BOTH | {"weights": WEIGHTS, "normalizer": 11.0},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_against_the_truth(setting):
    compare(STUDENT.astype(jnp.float32), **SETTINGS[setting])


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"z_loss": 0.1}])
def test_numbers_that_are_known(options):
    """At tracing, the ones of 0 among them: what they leave out changes no number."""
    student = STUDENT.astype(jnp.float32)
    known = jax.jit(
        jax.value_and_grad(partial(jaxkd.cross_entropy, chunk_size=CHUNK, **options), has_aux=True),
    )(student, LABELS)
    truth = row_cases.cross_entropy(cases.twin(student), LABELS, **options)
    row_cases.check_cross_entropy(known, truth, loss=3e-6, gradient=1e-5)


def test_float64(x64):
    student = STUDENT.astype(jnp.float64)
    (loss, metrics), gradient = compare(student, loss=1e-12, gradient=1e-12, **BOTH)
    assert loss.dtype == gradient.weight.dtype == jnp.float64
    assert {x.dtype for x in metrics.values()} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(("dtype", "bound"), [(jnp.bfloat16, 5e-3), (jnp.float16, 2e-3)])
def test_types(dtype, bound):
    student = cases.head(0, N, D, V, bias=True).astype(dtype)
    (loss, metrics), gradient = compare(student, gradient=bound, **BOTH)
    assert {x.dtype for x in (loss, *metrics.values())} == {jnp.dtype(jnp.float32)}
    assert {x.dtype for x in jax.tree.leaves(gradient)} == {jnp.dtype(dtype)}


def test_float16_gradients_of_many_rows_do_not_underflow():
    """A gradient below float16's least number, brought back into range by loss scaling, as float16 is trained."""
    student, normalizer, loss_scale = cases.head(0, N, D, V).astype(jnp.float16), 1e9, 2.0**28

    def scaled(student):
        return loss_scale * jaxkd.cross_entropy(student, LABELS, normalizer=normalizer, chunk_size=CHUNK)[0]

    want = row_cases.cross_entropy(cases.twin(student), LABELS, normalizer=normalizer / loss_scale).gradient
    assert np.abs(want.weight / loss_scale).max() < 6e-8
    assert max(cases.gradient_errors(jax.jit(jax.grad(scaled))(student), want).values()) <= 2e-3


# z = (0, ln 2, ln 5): q = (1/8, 1/4, 5/8), Z = 8.
WORKED = np.log(np.array([[1.0, 2.0, 5.0]], np.float32))


@pytest.mark.parametrize(("label", "nll"), [(0, ln(8)), (1, ln(4)), (2, ln(8 / 5))])
def test_worked_by_hand(label, nll):
    s, z, mean = 0.3, 0.25, (ln(8) + ln(4) + ln(8 / 5)) / 3
    options = {"label_smoothing": s, "z_loss": z, "weights": np.ones(1, np.float32)}
    (loss, metrics), gradient = value_and_grad(jaxkd.Logits(WORKED), np.array([label]), **options)
    np.testing.assert_allclose(loss, (1 - s) * nll + s * mean + z * ln(8) ** 2, rtol=1e-6)
    want = {"hard": nll, "log_normalizer": ln(8), "accuracy": float(label == 2), "num_rows": 1}
    assert {name: float(x) for name, x in metrics.items()} == pytest.approx(want, rel=1e-6)
    factor = 1 + 2 * z * ln(8)
    dlogits = np.array([factor / 8, factor / 4, factor * 5 / 8]) - s / 3
    dlogits[label] -= 1 - s
    np.testing.assert_allclose(gradient.values, [dlogits], rtol=1e-5)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_outside_implementation(label_smoothing):
    """optax's cross-entropy with smoothed labels, which share the uniform part with the label itself."""
    student = STUDENT.astype(jnp.float32)

    def of_optax(values):
        targets = optax.smooth_labels(jax.nn.one_hot(LABELS, V), label_smoothing)
        return optax.losses.softmax_cross_entropy(values, targets).mean(where=COUNTED)

    z = jnp.asarray(cases.twin(student).logits, jnp.float32)
    (loss, _), gradient = value_and_grad(jaxkd.Logits(z), LABELS, **PLAIN | {"label_smoothing": label_smoothing})
    want, want_gradient = jax.value_and_grad(of_optax)(z)
    np.testing.assert_allclose(loss, want, rtol=2e-6)
    assert cases.relative_error(gradient.values, want_gradient) < 1e-5


def test_leading_axes():
    student, labels = cases.head(0, (4, 6), D, V).astype(jnp.float32), cases.some_labels(2, (4, 6), V)
    compare(student, labels, **BOTH | {"weights": WEIGHTS[:1] * np.ones((4, 6), np.float32)})


@pytest.mark.parametrize("chunk_size", [1, N, None])
def test_chunk_size_changes_no_number(chunk_size):
    compare(STUDENT.astype(jnp.float32), chunk_size=chunk_size, **BOTH)


@pytest.mark.parametrize("is_labelled", [True, False])
def test_in_pieces(is_labelled, monkeypatch):
    """Logits of fewer rows at a time than a chunk has gradients."""
    student = cases.head(0, N, D, V).astype(jnp.float32)
    labels = LABELS if is_labelled else np.where(COUNTED, LABELS, 0)
    monkeypatch.setattr(chunk_sizes, "rows_of_piece", lambda *_: 2)
    chunks = chunk_sizes.rows_of_chunk(CHUNK, student)
    assert chunks.piece < chunks.size
    value_and_grad.clear_cache()  # which does not know of it
    compare(student, labels, **BOTH)
    value_and_grad.clear_cache()


# Which rows count


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_rows_that_do_not_count_are_never_looked_at(value):
    """The label is ignored, or the weight is 0."""
    weights = np.where(np.arange(N) % 4 == 0, 0, WEIGHTS)
    dead = ~COUNTED | (weights == 0)
    spoilt = STUDENT.map(lambda name, x: np.where(dead[:, None], value, x) if name == "hidden" else x)
    got = run(spoilt, **BOTH | {"weights": weights})
    assert_equal(got, run(**BOTH | {"weights": weights}))
    assert not np.any(got[1].hidden[dead])


def test_ignore_index():
    labels = np.where(COUNTED, np.where(LABELS == 5, 6, LABELS), 5)
    result = value_and_grad(STUDENT.astype(jnp.float32), labels, ignore_index=5, **BOTH)
    assert_equal(result, run(labels=np.where(labels == 5, -100, labels), **BOTH))


def test_micro_batches_add_up():
    student, total = STUDENT.astype(jnp.float32), float(WEIGHTS[COUNTED].sum())
    labels = np.append(LABELS, -100)
    weights = np.append(WEIGHTS, np.float32(1))
    hidden = jnp.pad(student.hidden, ((0, 1), (0, 0)))

    def part(rows):
        head = jaxkd.LinearLogits(hidden[rows], student.weight, student.bias, scale=student.scale, softcap=8.0)
        return value_and_grad(head, labels[rows], **BOTH | {"weights": weights[rows], "normalizer": total})

    parts = [part(slice(i, i + 8)) for i in (0, 8, 16)]
    (loss, metrics), gradient = run(**BOTH | {"weights": WEIGHTS})
    np.testing.assert_allclose(sum(x[0][0] for x in parts), loss, rtol=1e-5)
    for name, x in metrics.items():
        np.testing.assert_allclose(sum(part[0][1][name] for part in parts), x, rtol=1e-5, err_msg=name)
    assert cases.relative_error(sum(x[1].weight for x in parts), gradient.weight) < 1e-5


@pytest.mark.parametrize("label", [V, -1, 2**20])
def test_label_outside_the_vocabulary(label):
    labels = LABELS.copy()
    labels[3] = label
    assert np.isnan(run(labels=labels, **BOTH)[0][0])


def test_accuracy_counts_a_tie():
    z = np.zeros((4, 3), np.float32)
    z[1, 0] = z[2, 2] = 1
    options = PLAIN | {"weights": np.array([1, 2, 4, 8], np.float32)}
    (_, metrics), _ = value_and_grad(jaxkd.Logits(z), np.array([1, 0, 0, -100]), **options)
    np.testing.assert_allclose(metrics["accuracy"], 3 / 7, rtol=1e-6)


# Special logits


def closed(*columns, rows=3, width=11):
    z = np.random.default_rng(0).normal(scale=2, size=(rows, width)).astype(np.float32)
    z[:, list(columns)] = -np.inf
    return z


def of_logits(z, labels, **options):
    return value_and_grad(jaxkd.Logits(z), labels, **PLAIN | {"weights": np.ones(len(z), np.float32)} | options)


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_closed_tokens(z_loss):
    """As if they were not there, where nothing is smoothed."""
    z, labels = closed(2, 10), np.array([0, 1, 3])
    (loss, metrics), gradient = of_logits(z, labels, z_loss=z_loss)
    truth = row_cases.cross_entropy(z.astype(np.float64), labels, z_loss=z_loss)
    row_cases.check_cross_entropy(((loss, metrics), gradient), truth, loss=3e-6, gradient=1e-5)
    assert not np.any(gradient.values[:, [2, 10]])


def test_infinite_by_definition():
    """The label of a closed token; a uniform share of one."""
    z = closed(2, 10)
    (loss, metrics), _ = of_logits(z, np.array([0, 2, 3]))
    assert loss == metrics["hard"] == np.inf
    (loss, metrics), _ = of_logits(z, np.array([0, 1, 3]), label_smoothing=0.1)
    assert loss == np.inf
    assert np.isfinite(metrics["hard"])


def test_large_logits():
    z, labels = closed(), np.array([0, 4, -100])
    for shifted in (z + 1e4, z - 1e4, 5e3 * z):
        logits = shifted.astype(np.float32)
        (loss, metrics), gradient = of_logits(logits, labels, z_loss=1e-6, label_smoothing=0.1)
        truth = row_cases.cross_entropy(logits.astype(np.float64), labels, z_loss=1e-6, label_smoothing=0.1)
        np.testing.assert_allclose(loss, truth.loss, rtol=1e-5)
        np.testing.assert_allclose(metrics["log_normalizer"], truth.log_normalizer, rtol=1e-6)
        # Each probability is e^x with x rounded to the last place of 1e4.
        np.testing.assert_allclose(gradient.values, truth.gradient, atol=2e-3)


# Errors

Z, Y = jaxkd.Logits(jnp.ones((4, 5))), jnp.zeros(4, jnp.int32)
BAD = {
    "student": (lambda: jaxkd.cross_entropy(jnp.ones((4, 5)), Y), TypeError, "`student`.*LinearLogits"),
    "labels": (lambda: jaxkd.cross_entropy(Z, Y[:3]), ValueError, r"`labels`.*\(3,\).*`student.values`.*\(4,\)"),
    "no labels": (lambda: jaxkd.cross_entropy(Z, None), TypeError, "`labels`.*NoneType"),
    "smoothing above": (lambda: jaxkd.cross_entropy(Z, Y, label_smoothing=1.5), ValueError, "`label_smoothing`.*1.5"),
    "smoothing below": (lambda: jaxkd.cross_entropy(Z, Y, label_smoothing=-0.1), ValueError, "`label_smoothing`.*-0.1"),
    "smoothing nan": (lambda: jaxkd.cross_entropy(Z, Y, label_smoothing=np.nan), ValueError, "`label_smoothing`.*nan"),
    "smoothing array": (lambda: jaxkd.cross_entropy(Z, Y, label_smoothing=jnp.ones(4)), Exception, "`label_smoothing`"),
    "z-loss": (lambda: jaxkd.cross_entropy(Z, Y, z_loss=-1.0), ValueError, "`z_loss`.*-1"),
    "z-loss text": (lambda: jaxkd.cross_entropy(Z, Y, z_loss="small"), TypeError, "`z_loss`.*small"),
    "weights": (lambda: jaxkd.cross_entropy(Z, Y, weights=jnp.ones(3)), ValueError, r"`weights`.*\(3,\).*\(4,\)"),
    "negative": (lambda: jaxkd.cross_entropy(Z, Y, weights=-jnp.ones(4)), ValueError, "`weights`.*negative"),
    "normalizer": (lambda: jaxkd.cross_entropy(Z, Y, normalizer=-2.0), ValueError, "`normalizer`.*-2"),
    "chunk_size": (lambda: jaxkd.cross_entropy(Z, Y, chunk_size=0), ValueError, "`chunk_size`.*0"),
    "ignore_index": (lambda: jaxkd.cross_entropy(Z, Y, ignore_index=None), TypeError, "`ignore_index`.*None"),
    "implementation": (lambda: jaxkd.cross_entropy(Z, Y, implementation="cuda"), ValueError, "`implementation`.*cuda"),
    "no mask": (lambda: jaxkd.cross_entropy(Z, Y, mask=Y == 0), TypeError, "mask"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()
