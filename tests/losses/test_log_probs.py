"""Log-probabilities and statistics of tokens: dense float64 NumPy, a gradient of its own for every row, memory."""

from functools import partial

import cases
import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest

import jaxkd

B, T, D, D_TEACHER, V, CHUNK = 3, 9, 12, 8, 123, 8
STUDENT = cases.head(0, (B, T), D, V, bias=True, scale=0.7, softcap=8.0)
TEACHER = cases.head(1, (B, T), D_TEACHER, V - 4)
LABELS = cases.some_labels(2, (B, T), V)
LABELS[1] = -100
COUNTED = LABELS != -100
UPSTREAM = np.random.default_rng(3).normal(size=(B, T)).astype(np.float32)


def truth(student, labels=LABELS, upstream=UPSTREAM):
    """The log-probabilities, and the gradient of their sum weighted by ``upstream``."""
    counted = labels.reshape(-1) != -100
    log_q = cases.log_softmax(student.logits[counted])
    label = np.arange(len(log_q)), labels.reshape(-1)[counted]
    values = np.zeros(labels.size)
    values[counted] = log_q[label]
    dlogits = -np.exp(log_q)
    dlogits[label] += 1
    return values.reshape(labels.shape), student.gradients(upstream.reshape(-1)[counted, None] * dlogits, counted)


def run(student, labels=LABELS, chunk_size=CHUNK, upstream=UPSTREAM, ignore_index=-100):
    return values_and_pullback(student, labels, upstream, chunk_size, ignore_index)


@partial(jax.jit, static_argnums=(3, 4))
def values_and_pullback(student, labels, upstream, chunk_size, ignore_index):
    def log_probs(student):
        return jaxkd.token_log_probs(student, labels, chunk_size=chunk_size, ignore_index=ignore_index)

    values, pullback = jax.vjp(log_probs, student)
    return values, pullback(upstream.astype(values.dtype))[0]


def check(result, want, tolerance):
    assert cases.relative_error(result[0], want[0]) <= tolerance / 3
    errors = cases.gradient_errors(result[1], want[1])
    assert max(errors.values()) <= tolerance, errors


def assert_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_float64(x64):
    student = STUDENT.astype(jnp.float64)
    values, gradient = run(student)
    assert values.dtype == gradient.weight.dtype == jnp.float64
    check((values, gradient), truth(STUDENT), 1e-12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_types(dtype):
    student = STUDENT.astype(dtype)
    values, gradient = run(student)
    assert values.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(gradient)} == {jnp.dtype(dtype)}
    bounds = {"float32": 1e-5, "bfloat16": 5e-3, "float16": 2e-3}
    want = truth(cases.twin(student))
    assert cases.relative_error(values, want[0]) <= 1e-6
    assert max(cases.gradient_errors(gradient, want[1]).values()) <= bounds[jnp.dtype(dtype).name]


def test_float16_with_a_small_upstream_gradient():
    """1e-5 of a gradient: below what float16 holds were it rounded before the product."""
    student = cases.head(0, (B, T), D, V).astype(jnp.float16)
    _, gradient = run(student, upstream=1e-5 * np.ones((B, T)))
    want = truth(cases.twin(student), upstream=1e-5 * np.ones((B, T)))[1]
    assert cases.relative_error(gradient.weight, want.weight) < 0.02


def test_outside_implementation():
    torch = pytest.importorskip("torch")
    student = STUDENT.astype(jnp.float32)
    z = torch.tensor(cases.twin(student).logits)
    want = -torch.nn.functional.cross_entropy(z, torch.tensor(LABELS).flatten(), ignore_index=-100, reduction="none")
    np.testing.assert_allclose(run(student)[0].reshape(-1), want, rtol=1e-5, atol=1e-6)


def test_formed_logits():
    z = np.random.default_rng(0).normal(scale=3, size=(B, T, V)).astype(np.float32)
    values, gradient = run(jaxkd.Logits(z))
    log_q = cases.log_softmax(z.astype(np.float64))
    want = UPSTREAM[..., None] * (np.eye(V)[LABELS * COUNTED] - np.exp(log_q)) * COUNTED[..., None]
    assert cases.relative_error(gradient.values, want) < 1e-5
    np.testing.assert_allclose(values, np.where(COUNTED, (log_q * np.eye(V)[LABELS * COUNTED]).sum(-1), 0), rtol=1e-5)


@pytest.mark.parametrize("chunk_size", [1, B * T, None])
def test_chunk_size_changes_no_number(chunk_size):
    student = STUDENT.astype(jnp.float32)
    check(run(student, chunk_size=chunk_size), truth(cases.twin(student)), 1e-5)


def test_rows_that_do_not_count_are_never_looked_at():
    """In either pass, their upstream gradient included."""

    def spoil(name, x):
        return np.where(COUNTED[..., None], x, np.nan) if name == "hidden" else x

    clean = run(STUDENT.astype(jnp.float32))
    spoiled = run(STUDENT.map(spoil).astype(jnp.float32), upstream=np.where(COUNTED, UPSTREAM, np.nan))
    assert_equal(spoiled, clean)
    assert not np.any(clean[0][~COUNTED])


def test_nothing_counts():
    assert not any(np.any(x) for x in jax.tree.leaves(run(STUDENT.astype(jnp.float32), np.full((B, T), -100))))


def test_no_rows_at_all():
    values = jaxkd.token_log_probs(cases.head(0, (0, T), D, V).astype(jnp.float32), np.zeros((0, T), int))
    assert values.shape == (0, T)


def test_ignore_index():
    labels = np.where(COUNTED, LABELS, 5)
    labels[0, 0] = 5
    result = run(STUDENT.astype(jnp.float32), labels, ignore_index=5)
    check(result, truth(cases.twin(STUDENT.astype(jnp.float32)), np.where(labels == 5, -100, labels)), 1e-5)


def test_label_outside_the_vocabulary_is_nan_in_its_row_alone():
    labels = LABELS.copy()
    labels[0, :2] = V, -1
    values, _ = run(STUDENT.astype(jnp.float32), labels)
    assert np.isnan(values[0, :2]).all()
    assert not np.isnan(values).any(where=np.arange(B * T).reshape(B, T) > 1)


def test_label_of_a_closed_token():
    z = np.zeros((2, 3), np.float32)
    z[0, 1] = -np.inf
    np.testing.assert_allclose(
        jaxkd.token_log_probs(jaxkd.Logits(z), np.array([1, 1])), [-np.inf, -np.log(3)], rtol=1e-6
    )


@pytest.mark.parametrize("average", [False, True])
def test_sequences(average):
    student = STUDENT.astype(jnp.float32)
    count = np.maximum(COUNTED.sum(1), 1) if average else np.ones(B)

    def total(student):
        values = jaxkd.sequence_log_probs(student, LABELS, average=average, chunk_size=CHUNK)
        return values @ UPSTREAM[:, 0], values

    (_, values), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(student)
    share = np.broadcast_to((UPSTREAM[:, 0] / count)[:, None], (B, T))
    want, want_gradient = truth(cases.twin(student), upstream=share)
    assert values[1] == 0
    check((values, gradient), (want.sum(1) / count, want_gradient), 1e-5)


def test_vmap_and_per_row_jacobian():
    student = STUDENT.astype(jnp.float32)
    want = run(student)[0]

    def one(hidden, labels):
        sequence = jaxkd.LinearLogits(
            hidden, student.weight, student.bias, scale=student.scale, softcap=student.softcap
        )
        return jaxkd.token_log_probs(sequence, labels, chunk_size=4)

    np.testing.assert_allclose(jax.jit(jax.vmap(one))(student.hidden, LABELS), want, rtol=2e-6, atol=1e-6)
    jacobian = jax.jit(jax.jacrev(one))(
        student.hidden[0], LABELS[0]
    )  # (T, T, D): a row depends on its own hidden state alone
    np.testing.assert_array_equal(np.abs(np.asarray(jacobian)).max(-1) > 0, np.diag(COUNTED[0]))


def test_remat_and_second_use():
    student = STUDENT.astype(jnp.float32)

    def loss(student):
        log_probs = jaxkd.token_log_probs(student, LABELS, chunk_size=CHUNK)
        return jnp.sum(jnp.exp(log_probs)) + jnp.vdot(log_probs, UPSTREAM)

    values, _ = truth(cases.twin(student))
    want = truth(cases.twin(student), upstream=np.exp(values) + UPSTREAM)[1]
    for function in (loss, jax.checkpoint(loss)):
        assert max(cases.gradient_errors(jax.jit(jax.grad(function))(student), want).values()) < 1e-5


# Memory and work


@pytest.mark.parametrize("rows", [96, 91])
def test_no_more_than_a_chunk_of_logits(rows):
    vocabulary, hidden, chunk_size = 1009, 40, 16
    student = cases.head(0, rows, hidden, vocabulary, bias=True).astype(jnp.float32)
    labels = cases.some_labels(1, rows, vocabulary)

    def loss(student):
        return jnp.sum(jnp.square(jaxkd.token_log_probs(student, labels, chunk_size=chunk_size)))

    jaxpr = jax.make_jaxpr(jax.grad(loss))(student)
    assert jaxprs.most_rows(jaxpr, vocabulary, {(vocabulary, hidden), (hidden, vocabulary)}) == chunk_size
    assert len(jaxprs.products(jaxpr)) == 4
    assert len(jaxprs.products(jax.make_jaxpr(loss)(student))) == 1


def test_head_gradient_is_carried_in_float32():
    student = cases.head(0, (B, T), D, V).astype(jnp.bfloat16)
    jaxpr = jax.make_jaxpr(jax.grad(lambda s: jnp.sum(jaxkd.token_log_probs(s, LABELS, chunk_size=CHUNK))))(student)
    loops = [x for x in jaxprs.equations(jaxpr) if x.primitive.name in ("scan", "while")]
    carried = {v.aval.dtype for loop in loops for v in loop.outvars if v.aval.shape == (V, D)}
    assert carried == {jnp.dtype(jnp.float32)}


def temporary_bytes(rows, chunk_size=64, width=8192, hidden=64):
    student = jaxkd.LinearLogits(*(jax.ShapeDtypeStruct((size, hidden), jnp.float32) for size in (rows, width)))
    labels = jax.ShapeDtypeStruct((rows,), jnp.int32)

    def loss(student, labels):
        return jnp.sum(jnp.square(jaxkd.token_log_probs(student, labels, chunk_size=chunk_size)))

    return jax.jit(jax.grad(loss)).lower(student, labels).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.optimized
def test_compiled_memory_does_not_grow_with_the_rows():
    few, many = temporary_bytes(512), temporary_bytes(4096)
    assert few <= 4 * (12 * 64 * 8192 + 2 * 64 * 8192 + 8 * 512 * 64)
    assert many - few <= 4 * (4096 - 512) * (8 * 64)


# Statistics


def test_statistics():
    student, teacher = STUDENT.astype(jnp.float32), TEACHER.astype(jnp.float32)
    options = {"divergence": jaxkd.jensen_shannon(), "temperature": 2.0, "vocabulary": "truncate"}
    statistics = partial(jaxkd.token_statistics, chunk_size=CHUNK, **options)
    got = jax.jit(statistics)(student, LABELS, teacher)
    z, z_teacher = (cases.twin(x).logits.reshape(B, T, -1) for x in (student, teacher))
    log_q = cases.log_softmax(z)
    log_q_tau, log_p_tau = cases.log_softmax(z[..., : V - 4] / 2), cases.log_softmax(z_teacher / 2)
    want = {
        "log_normalizer": z[..., 0] - log_q[..., 0],
        "entropy": -(np.exp(log_q) * log_q).sum(-1),
        "log_prob": truth(cases.twin(student))[0],
        "correct": z.argmax(-1) == LABELS,
        "soft": cases.jensen_shannon(0.5)(log_p_tau, log_q_tau)[0],
        "agrees": z.argmax(-1) == z_teacher.argmax(-1),
    }
    assert got.keys() == want.keys() | {"top"}
    for name, value in want.items():
        np.testing.assert_allclose(got[name], np.where(COUNTED, value, 0), rtol=2e-5, atol=1e-6, err_msg=name)
    np.testing.assert_array_equal(got["top"], np.where(COUNTED, z.argmax(-1), -1))
    assert got["top"].dtype == jnp.int32


def test_statistics_of_a_student_alone():
    z = np.array([[0.0, np.log(3.0), -np.inf], [5.0, 5.0, 5.0]], np.float32)
    got = jaxkd.token_statistics(jaxkd.Logits(z))
    assert got.keys() == {"log_normalizer", "entropy", "top"}
    np.testing.assert_allclose(got["log_normalizer"], [np.log(4), 5 + np.log(3)], rtol=1e-6)
    np.testing.assert_allclose(got["entropy"], [np.log(4) - 0.75 * np.log(3), np.log(3)], rtol=1e-6)
    assert got["top"][0] == 1


def test_statistics_with_a_divergence_of_rows():
    z, z_teacher = np.random.default_rng(0).normal(size=(2, 5, 7)).astype(np.float32)
    got = jaxkd.token_statistics(jaxkd.Logits(z), teacher=jaxkd.Logits(z_teacher), divergence=jaxkd.mse, chunk_size=2)
    np.testing.assert_allclose(got["soft"], np.square(z - z_teacher).mean(1), rtol=1e-5)


def test_statistics_never_look_at_other_rows_and_carry_no_gradient():
    student, teacher = STUDENT.astype(jnp.float32), TEACHER.astype(jnp.float32)
    poisoned = jaxkd.LinearLogits(jnp.where(COUNTED[..., None], student.hidden, jnp.nan), student.weight)

    def entropy(student):
        statistics = jaxkd.token_statistics(student, LABELS, teacher, vocabulary="truncate", chunk_size=CHUNK)
        return sum(jnp.sum(x.astype(jnp.float32)) for x in statistics.values())

    value, gradient = jax.jit(jax.value_and_grad(entropy))(poisoned)
    assert np.isfinite(value)
    assert not any(np.any(x) for x in jax.tree.leaves(gradient))


def test_statistics_form_no_more_than_a_chunk():
    student, teacher = (cases.head(seed, 96, 40, 1009).astype(jnp.float32) for seed in (0, 1))
    labels = cases.some_labels(1, 96, 1009)
    jaxpr = jax.make_jaxpr(lambda s, t: jaxkd.token_statistics(s, labels, t, chunk_size=16))(student, teacher)
    assert jaxprs.most_rows(jaxpr, 1009, {(1009, 40), (40, 1009)}) == 16


Z = jaxkd.Logits(jnp.ones((4, 5)))
BAD = [
    (lambda: jaxkd.token_log_probs(jnp.ones((4, 5)), jnp.zeros(4, int)), TypeError, "`student`.*LinearLogits"),
    (lambda: jaxkd.token_log_probs(Z, jnp.zeros(3, int)), ValueError, r"`labels`.*\(3,\).*`student.values`.*\(4,\)"),
    (lambda: jaxkd.token_log_probs(Z, jnp.zeros(4)), TypeError, "`labels`.*float32"),
    (lambda: jaxkd.token_log_probs(Z, jnp.zeros(4, int), chunk_size=0), ValueError, "`chunk_size`.*0"),
    (lambda: jaxkd.token_log_probs(Z, jnp.zeros(4, int), ignore_index=None), TypeError, "`ignore_index`.*None"),
    (lambda: jaxkd.sequence_log_probs(jaxkd.Logits(jnp.ones(5)), 3), ValueError, r"`labels`.*\(\)"),
    (lambda: jaxkd.token_statistics(Z, teacher=jaxkd.Logits(jnp.ones((3, 5)))), ValueError, "`teacher.values`"),
    (lambda: jaxkd.token_statistics(Z, teacher=Z, divergence="kl"), TypeError, "`divergence`.*kl"),
    (lambda: jaxkd.token_statistics(Z, teacher=Z, temperature=0.0), ValueError, "`temperature`.*0"),
    (lambda: jaxkd.token_statistics(Z, teacher=jaxkd.Logits(jnp.ones((4, 7)))), ValueError, "V=5.*V=7.*`vocabulary`"),
    (lambda: jaxkd.token_statistics(Z, teacher=Z, vocabulary="pad"), ValueError, "`vocabulary`.*pad"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
