"""Cached top-k teachers: worked numbers, float64 truth token by token, the laws of the bucket, and what is refused."""

import itertools
from functools import partial

import cases
import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest

import jaxkd

N, V, K, CHUNK = 13, 61, 9, 4
DIVERGENCES = {name: cases.DIVERGENCES[name] for name in cases.ONE_OF_EACH}
TAILS = [
    *((name, "bucket") for name in DIVERGENCES),
    ("reverse_kl", "renormalize"),
    ("jensen_shannon", "renormalize"),
    ("forward_kl", "zero"),
]


def logits(seed, width=V):
    return np.random.default_rng(seed).normal(scale=2, size=(N, width))


def captured(teacher, k=K, temperature=1.0):
    """The k likeliest tokens of each row, in random order."""
    log_p = cases.log_softmax(teacher / temperature)
    ids = np.argsort(-log_p, axis=-1)[:, :k]
    ids = np.random.default_rng(4).permuted(ids, axis=1)
    return np.take_along_axis(log_p, ids, -1), ids.astype(np.int32)


def ragged(log_probs, ids):
    """Between K and K - 4 tokens a row: the rest is padding of both kinds, and a token that came before."""
    log_probs, ids = log_probs.copy(), ids.copy()
    for row in range(1, N):
        ids[row, -1] = ids[row, 0]
        if row % 4 > 1:
            ids[row, 1] = -1
        if row % 4 > 2:
            log_probs[row, 2] = -np.inf
    return log_probs, ids


def truth(name, tail, student, log_probs, ids, temperature=1.0, captured_at=1.0):
    """The mean over rows, one row after the other, of a dictionary of tokens."""
    total = 0.0
    for z, row_log_probs, row_ids in zip(student, log_probs, ids, strict=True):
        known = {}
        for token, log_prob in zip(row_ids.tolist(), row_log_probs, strict=True):
            if token != -1 and log_prob > -np.inf and token not in known:
                known[token] = log_prob
        p, q = np.exp(list(known.values())), np.exp(cases.log_softmax(z / temperature))
        others = np.delete(q, list(known)).sum()
        q = q[list(known)]
        if tail == "renormalize":
            p = p ** (captured_at / temperature)
            p, q = p / p.sum(), q / q.sum()
        elif tail == "bucket":
            p, q = np.append(p, 1 - p.sum()), np.append(q, others)
        total += DIVERGENCES[name].truth(np.log(p), np.log(q))[0]
    return total / len(student)


def value_and_grad(student, teacher, dtype=jnp.float32, **options):
    return _value_and_grad(jnp.asarray(student, dtype), teacher, **options)


@partial(jax.jit, static_argnames=("sharding",))
def _value_and_grad(student, teacher, **options):
    """With the teacher, the divergence's parameters and all numbers traced: one program for many tests."""

    def loss(values):
        return jaxkd.distillation_loss(jaxkd.Logits(values), teacher, chunk_size=CHUNK, **options)[0]

    return jax.value_and_grad(loss)(student)


QUARTERS = np.zeros((1, 4))
LN = np.log
WORKED = [  # ids, probabilities, divergence, tail, the value; the student has 1/4 each
    ([0, 1], [0.5, 0.25], "forward_kl", "bucket", 0.5 * LN(2) + 0.25 * LN(0.5)),
    ([1, 0], [0.25, 0.5], "forward_kl", "bucket", 0.5 * LN(2) + 0.25 * LN(0.5)),
    ([0, 1], [0.5, 0.25], "forward_kl", "renormalize", 2 / 3 * LN(4 / 3) + 1 / 3 * LN(2 / 3)),
    ([0, 1], [0.5, 0.25], "forward_kl", "zero", 0.5 * LN(2)),
    ([0, 1], [0.1, 0.1], "forward_kl", "zero", 0.2 * LN(0.4)),  # negative
    ([0, 1], [0.5, 0.25], "reverse_kl", "bucket", 0.25 * LN(0.5) + 0.5 * LN(2)),
    ([0, 1], [0.5, 0.25], "total_variation", "bucket", 0.25),
    ([3, 3, -1, 2], [0.5, 0.9, 0.8, 0.0], "total_variation", "bucket", 0.25),  # one token is known
    ([3, 3, -1, 2], [0.0, 0.5, 0.8, 0.0], "total_variation", "bucket", 0.25),  # padding is no first occurrence
    ([3, 0, 1, 2], [0.25, 0.5, 0.25, 0.0], "total_variation", "bucket", 0.25),
    ([2], [1.0], "jensen_shannon", "renormalize", 0.0),
]


@pytest.mark.parametrize(("ids", "p", "name", "tail", "value"), WORKED)
def test_worked_numbers(ids, p, name, tail, value):
    with np.errstate(divide="ignore"):
        teacher = jaxkd.TopKLogProbs(np.log(np.array([p])), np.array([ids]), tail=tail)
    loss, _ = value_and_grad(QUARTERS, teacher, divergence=DIVERGENCES[name].make())
    assert float(loss) == pytest.approx(value, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize(("name", "tail"), TAILS)
def test_float64(name, tail, x64):
    """The value, and the gradient along a direction by central differences of the truth."""
    student, captured_at = logits(1), 1.0 if tail == "renormalize" else 1.5
    log_probs, ids = ragged(*captured(logits(2), temperature=captured_at))
    teacher = jaxkd.TopKLogProbs(log_probs, ids, temperature=captured_at, tail=tail)
    options = {"divergence": DIVERGENCES[name].make(), "temperature": 1.5}
    loss, gradient = value_and_grad(student, teacher, jnp.float64, **options)

    def exact(z):
        return truth(name, tail, z, log_probs, ids, 1.5, captured_at)

    assert float(loss) == pytest.approx(exact(student), rel=1e-11)
    direction, step = logits(3), 1e-6
    difference = (exact(student + step * direction) - exact(student - step * direction)) / (2 * step)
    assert float(np.vdot(gradient, direction)) == pytest.approx(difference, rel=1e-6)
    if tail == "renormalize":
        assert np.count_nonzero(gradient) <= N * K


@pytest.mark.parametrize("name", ["forward_kl", "jensen_shannon"])
def test_a_bucket_is_a_lower_bound_that_rises_to_the_whole(name):
    """The data-processing inequality, for every K up to V, where it is the dense loss and its gradient."""
    student, teacher = logits(1), logits(2)
    options = {"divergence": DIVERGENCES[name].make()}
    dense, dense_gradient = value_and_grad(student, jaxkd.Logits(jnp.asarray(teacher, jnp.float32)), **options)
    # Of one shape, so that it is compiled once: what is not listed is padding.
    log_probs, ids = captured(teacher, V)
    order = np.argsort(-log_probs, axis=1)
    log_probs, ids = (np.take_along_axis(x, order, 1) for x in (log_probs.astype(np.float32), ids))
    bounds, gradients = [], []
    for k in (1, 3, 10, 30, V):
        bound, gradient = value_and_grad(
            student, jaxkd.TopKLogProbs(log_probs, np.where(np.arange(V) < k, ids, -1)), **options
        )
        bounds.append(float(bound))
        gradients.append(gradient)
    assert bounds[0] > 0
    assert all(a < b for a, b in itertools.pairwise(bounds))
    assert bounds[-1] == pytest.approx(float(dense), rel=1e-6)
    assert cases.relative_error(gradients[-1], dense_gradient) < 2e-6


@pytest.mark.parametrize("tail", ["bucket", "zero"])
def test_all_tokens_are_the_dense_loss_at_any_temperature(tail):
    student, teacher = logits(1), logits(2)
    log_probs, ids = captured(teacher, V, temperature=0.7)
    options = {"temperature": 2.0}
    dense, gradient = value_and_grad(student, jaxkd.Logits(jnp.asarray(teacher, jnp.float32)), **options)
    top = jaxkd.TopKLogProbs(log_probs.astype(np.float32), ids, temperature=0.7, tail=tail)
    got, got_gradient = value_and_grad(student, top, **options)
    assert float(got) == pytest.approx(float(dense), rel=1e-6)
    assert cases.relative_error(got_gradient, gradient) < 2e-6


def test_a_missing_token_at_another_temperature_is_no_number():
    """K = V, and so it is seen only in the values."""
    log_probs, ids = captured(logits(2), V)
    ids[5, 7] = -1
    loss, _ = value_and_grad(logits(1), jaxkd.TopKLogProbs(log_probs, ids), temperature=2.0)
    assert np.isnan(loss)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jensen_shannon"])
@pytest.mark.parametrize("missing", [0.0, 1e-9])
def test_a_sure_teacher_is_finite(name, missing):
    """What is left of its probability is less than a rounding."""
    log_probs = np.log(np.array([[1 - missing, missing / 2 or 1e-30]] * N, np.float32))
    ids = np.tile(np.array([[3, 8]], np.int32), (N, 1))
    loss, gradient = value_and_grad(logits(1), jaxkd.TopKLogProbs(log_probs, ids), divergence=DIVERGENCES[name].make())
    assert np.isfinite(loss)
    assert np.all(np.isfinite(gradient))


def test_a_student_without_other_tokens():
    """Both can emit three tokens alone, all of them listed: the rest is empty on either side."""
    student, teacher = (np.where(np.arange(V) < 3, logits(seed), -np.inf) for seed in (1, 2))
    log_probs, ids = captured(teacher, 3)
    top = jaxkd.TopKLogProbs(log_probs.astype(np.float32), ids)
    got = value_and_grad(student, top)
    want = value_and_grad(student[:, :3], jaxkd.Logits(jnp.asarray(teacher[:, :3], jnp.float32)))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    np.testing.assert_allclose(got[1][:, :3], want[1], rtol=1e-4, atol=1e-7)
    assert not np.any(got[1][:, 3:])


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_a_row_of_padding_is_nothing(tail):
    log_probs, ids = captured(logits(2))
    rest = np.arange(N) != 5
    ids[5] = -1
    loss, gradient = value_and_grad(logits(1), jaxkd.TopKLogProbs(log_probs, ids, tail=tail))
    want, _ = value_and_grad(logits(1)[rest], jaxkd.TopKLogProbs(log_probs[rest], ids[rest], tail=tail))
    np.testing.assert_allclose(loss * N, want * (N - 1), rtol=1e-6)
    assert np.all(np.isfinite(gradient))
    assert not np.any(gradient[5])


@pytest.mark.parametrize(("name", "tail"), [("jensen_shannon", "bucket"), ("forward_kl", "zero")])
def test_masks_weights_hard_loss_and_poison(name, tail, x64):
    """As the mean of rows that are computed alone, with cross-entropy beside it; ignored rows hold anything."""
    student = cases.head(0, N, 8, V).astype(jnp.float64)
    labels = cases.some_labels(3, N, V, ignored=0.4)
    weights = np.random.default_rng(5).uniform(0.5, 2, size=N)
    counted = labels != -100
    log_probs, ids = captured(logits(2))
    options = {"divergence": DIVERGENCES[name].make(), "hard_weight": 0.5, "weights": weights}
    want_soft = [
        truth(name, tail, *(x[[row]] for x in (cases.twin(student).logits, log_probs, ids)))
        for row in np.flatnonzero(counted)
    ]
    z = cases.twin(student).logits[counted]
    want_hard = -cases.log_softmax(z)[np.arange(len(z)), labels[counted]]

    log_probs, ids = (np.where(counted[:, None], x, bad) for x, bad in ((log_probs, np.nan), (ids, V + 5)))
    poisoned = jnp.where(counted[:, None], student.hidden, jnp.nan)

    @partial(jax.jit, static_argnums=1)
    @partial(jax.value_and_grad, has_aux=True)
    def value_and_gradient(hidden, chunk_size):
        teacher = jaxkd.TopKLogProbs(log_probs, ids, tail=tail)
        return jaxkd.distillation_loss(
            jaxkd.LinearLogits(hidden, student.weight), teacher, labels, chunk_size=chunk_size, **options
        )

    (got, metrics), gradient = value_and_gradient(poisoned, CHUNK)
    w = weights[counted] / weights[counted].sum()
    assert metrics["soft"] == pytest.approx(w @ want_soft, rel=1e-6)
    assert metrics["hard"] == pytest.approx(w @ want_hard, rel=1e-6)
    assert float(got) == pytest.approx(w @ want_soft + 0.5 * (w @ want_hard), rel=1e-11)
    assert not np.any(gradient[~counted])
    assert np.any(gradient[counted], axis=1).all()
    (other, _), other_gradient = value_and_gradient(poisoned, 1000)
    assert float(other) == pytest.approx(float(got), rel=1e-13)
    np.testing.assert_allclose(other_gradient, gradient, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("wrong", [V, -2, 2**31 - 1])
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_an_id_outside_the_vocabulary(wrong, tail):
    """NaN where the row counts and the entry is no padding; nothing where not."""
    log_probs, ids = captured(logits(2))
    ids[5, 2] = wrong
    labels = np.zeros(N, np.int32)
    for label, entry, is_nan in ((0, 0.0, True), (-100, 0.0, False), (0, -np.inf, False)):
        labels[5], log_probs[5, 2] = label, entry or log_probs[5, 2]
        teacher = jaxkd.TopKLogProbs(log_probs, ids, tail=tail)
        loss, gradient = value_and_grad(logits(1), teacher, labels=labels)
        assert np.isnan(loss) == is_nan
        assert np.isnan(gradient).any() == is_nan


@pytest.mark.parametrize("row", [np.full(K, 0.5), np.where(np.arange(K) == 1, np.nan, -4.0), np.full(K, np.log(0.2))])
def test_no_distribution_is_no_number(row):
    log_probs, ids = captured(logits(2))
    log_probs[5] = row
    assert np.isnan(value_and_grad(logits(1), jaxkd.TopKLogProbs(log_probs, ids))[0])


def test_traced_temperature_and_arrays():
    """One program: the capture's own temperature gives the number, another one none."""
    student = jaxkd.Logits(jnp.asarray(logits(1), jnp.float32))
    log_probs, ids = captured(logits(2), temperature=1.3)
    traces = []

    @jax.jit
    def loss(student, teacher, temperature):
        traces.append(1)
        return jaxkd.distillation_loss(student, teacher, temperature=temperature, chunk_size=CHUNK)[0]

    teacher = jaxkd.TopKLogProbs(jnp.asarray(log_probs, jnp.float32), ids, temperature=1.3)
    want = jaxkd.distillation_loss(student, teacher, temperature=1.3, chunk_size=CHUNK)[0]
    assert float(loss(student, teacher, 1.3)) == pytest.approx(float(want), rel=1e-6)
    assert np.isnan(loss(student, teacher, 1.4))
    assert len(traces) == 1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_types(dtype):
    """As the loss of the rounded values."""
    student = cases.head(0, N, 8, V).astype(dtype)
    log_probs, ids = captured(logits(2))
    teacher = jaxkd.TopKLogProbs(jnp.asarray(log_probs, dtype), ids.astype(np.int16))
    grad = jax.jit(jax.value_and_grad(lambda x: jaxkd.distillation_loss(x, teacher, chunk_size=CHUNK)[0]))
    loss, gradient = grad(student)
    rounded = np.asarray(teacher.log_probs).astype(np.float64)
    want = truth("forward_kl", "bucket", cases.twin(student).logits, rounded, ids)
    assert loss.dtype == jnp.float32
    assert float(loss) == pytest.approx(want, rel=1e-5)
    assert gradient.weight.dtype == dtype


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.uint32])
def test_id_types(dtype):
    """A narrow type holds the ids and not the width."""
    ids = np.array([[3, -1, 8]]).astype(dtype)
    ids[ids > 200] = 3 if dtype == np.uint8 else ids.max()  # what is padding in the others, a repetition here
    teacher = jaxkd.TopKLogProbs(np.log(np.array([[0.5, 0.2, 0.25]], np.float32)), ids)
    student = jaxkd.Logits(jnp.zeros((1, 300)))
    want = 0.5 * LN(150) + 0.25 * LN(75) + 0.25 * LN(0.25 / (298 / 300))
    assert float(jaxkd.distillation_loss(student, teacher)[0]) == pytest.approx(want, rel=1e-6)


def test_leading_axes():
    log_probs, ids = captured(logits(2))
    flat, _ = value_and_grad(logits(1)[:12], jaxkd.TopKLogProbs(log_probs[:12], ids[:12]))
    by_sequence = jaxkd.TopKLogProbs(log_probs[:12].reshape(3, 4, K), ids[:12].reshape(3, 4, K))
    assert value_and_grad(logits(1)[:12].reshape(3, 4, V), by_sequence)[0] == flat


def test_no_gradient_to_the_teacher():
    log_probs, ids = captured(logits(2))
    student = jaxkd.Logits(jnp.asarray(logits(1), jnp.float32))
    gradient = jax.grad(lambda x: jaxkd.distillation_loss(student, jaxkd.TopKLogProbs(x, ids))[0])(
        jnp.asarray(log_probs)
    )
    assert not np.any(gradient)


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "zero"])
def test_no_more_than_a_chunk_of_logits(tail):
    rows, width, hidden, chunk_size = 96, 1009, 40, 16
    student = cases.head(0, rows, hidden, width).astype(jnp.float32)

    def loss(student, log_probs, ids):
        teacher = jaxkd.TopKLogProbs(log_probs, ids, tail=tail)
        return jaxkd.distillation_loss(student, teacher, chunk_size=chunk_size)[0]

    arrays = jnp.zeros((rows, K)), jnp.zeros((rows, K), int)
    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss))(student, *arrays)
    assert jaxprs.most_rows(jaxpr, width, {(width, hidden), (hidden, width)}) == chunk_size


def test_rows_over_a_mesh():
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices("cpu")[:1])
    log_probs, ids = captured(logits(2))
    teacher = jaxkd.TopKLogProbs(log_probs, ids)
    want = value_and_grad(logits(1), teacher)
    got = value_and_grad(logits(1), teacher, sharding=jaxkd.Sharding("data", mesh=mesh))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-5, atol=1e-8)


GOOD = {"log_probs": jnp.full((2, 3), -2.0), "token_ids": jnp.arange(6).reshape(2, 3)}
BAD = [
    ({"log_probs": jnp.zeros((2, 3), int)}, {}, TypeError, "`teacher.log_probs` is int32.*floating"),
    ({"log_probs": [[-1.0]]}, {}, TypeError, "`teacher.log_probs` is a list"),
    ({"log_probs": jnp.zeros(())}, {}, ValueError, "`teacher.token_ids`.*shape"),
    ({"token_ids": jnp.zeros((2, 3))}, {}, TypeError, "`teacher.token_ids` is float32.*integer"),
    ({"token_ids": jnp.zeros((2, 2), int)}, {}, ValueError, r"`teacher.token_ids`.*\(2, 2\).*\(2, 3\)"),
    ({"log_probs": jnp.zeros((2, 0)), "token_ids": jnp.zeros((2, 0), int)}, {}, ValueError, r"\(2, 0\).*K"),
    ({"log_probs": -jnp.ones((2, 12)), "token_ids": jnp.zeros((2, 12), int)}, {}, ValueError, r"\(2, 12\).*V=11"),
    ({"log_probs": -jnp.ones((4, 3)), "token_ids": jnp.zeros((4, 3), int)}, {}, ValueError, r"\(4,\).*\(2,\)"),
    ({"log_probs": jnp.ones((2, 3))}, {}, ValueError, "`teacher.log_probs`.*positive.*logits"),
    (
        {"log_probs": jnp.array([[-0.1, -2.5, 0.0]] * 2), "token_ids": jnp.array([[5, 7, 0], [5, 7, -1]])},
        {},
        ValueError,
        "`teacher` has rows that list token 0 with log-probability 0.*pad with token id -1 or log-probability -inf",
    ),
    ({"token_ids": [[0, 1, 2]] * 2}, {}, TypeError, "`teacher.token_ids` is a list; give an array"),
    ({"tail": "none"}, {}, ValueError, "`teacher.tail`.*none.*bucket.*renormalize.*zero"),
    ({"temperature": 0.0}, {}, ValueError, "`teacher.temperature`.*0"),
    ({"temperature": "1"}, {}, TypeError, "`teacher.temperature`.*number"),
    ({"temperature": 2.0}, {}, ValueError, "captured at temperature 2.*loss has 1.*unknown.*renormalize"),
    ({"tail": "zero"}, {"temperature": 2.0}, ValueError, "captured at temperature 1.*loss has 2"),
    ({"tail": "zero"}, {"divergence": jaxkd.reverse_kl}, ValueError, "`teacher.tail.*zero.*negative"),
    ({"tail": "zero"}, {"divergence": jaxkd.jensen_shannon(0.5)}, ValueError, "`teacher.tail.*zero.*negative"),
    ({}, {"divergence": jaxkd.earth_mover}, ValueError, "`divergence`.*whole rows.*`teacher`, a TopKLogProbs"),
    ({}, {"implementation": "triton"}, ValueError, "implementation.*triton.*buckets of tokens.*xla"),
    ({}, {"implementation": "mosaic"}, ValueError, "implementation.*mosaic.*buckets of tokens.*xla"),
]


@pytest.mark.parametrize(("changes", "options", "error", "message"), BAD)
def test_bad_input(changes, options, error, message):
    with pytest.raises(error, match=message):
        jaxkd.distillation_loss(jaxkd.Logits(jnp.ones((2, 11))), jaxkd.TopKLogProbs(**GOOD | changes), **options)


@pytest.mark.parametrize("ids", [[0, -1, 0], [0, 0, 0], [0, 3, 4]])
def test_token_0_may_be_certain(ids):
    """Alone, or beside what rounding left of others: log 11 away from the uniform student."""
    certain = jnp.array([[0.0, -jnp.inf if -1 in ids else -11.0, 0.0 if ids[2] == 0 else -12.0]])
    loss, _ = jaxkd.distillation_loss(jaxkd.Logits(jnp.ones((1, 11))), jaxkd.TopKLogProbs(certain, jnp.array([ids])))
    assert float(loss) == pytest.approx(np.log(11), rel=1e-3)


def test_a_vocabulary_that_is_split_is_refused():
    mesh = jax.sharding.AbstractMesh((2,), ("model",))
    sharding = jaxkd.Sharding(vocabulary="model", mesh=mesh)
    for teacher in (jaxkd.TopKLogProbs(**GOOD), jaxkd.Mixture([jaxkd.Logits(jnp.ones((2, 11)))])):
        with pytest.raises(ValueError, match=rf"`sharding`.*{type(teacher).__name__}.*`vocabulary`"):
            jaxkd.distillation_loss(jaxkd.Logits(jnp.ones((2, 11))), teacher, sharding=sharding)
