"""A mixture of top-k teachers: worked numbers, float64 truth token by token, what is exact, and what is refused."""

from functools import partial

import cases
import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from sweeps import all_but

import jaxkd

N, V, CHUNK = 13, 61, 4
SIZES = (9, 5, 7)
LN = np.log
SHARES = np.random.default_rng(5).uniform(0.2, 1.0, size=(N, 3))
SHARES[::3, 1] = 0


def logits(seed, width=V):
    return np.random.default_rng(seed).normal(scale=2, size=(N, width))


def captured(temperature=1.0):
    """Log-probabilities and ids of three teachers, lists of their own length; in some rows one has no entries."""
    lists = []
    for seed, k in zip((2, 3, 4), SIZES, strict=True):
        log_p = cases.log_softmax((logits(1) + logits(seed)) / temperature)  # they agree on some tokens
        ids = np.random.default_rng(seed).permuted(np.argsort(-log_p, axis=1)[:, :k], axis=1)
        lists.append((np.take_along_axis(log_p, ids, 1), ids.astype(np.int32)))
    lists[0][1][4:6] = -1
    lists[2][1][5:7, 1:] = -1
    lists[1][1][8, 3] = lists[1][1][8, 0]  # twice in a list: the first counts
    return lists


def truth(name, tail, student, lists, shares, temperature=1.0, captured_at=1.0):
    """The mean over rows, one row after the other, of dictionaries of tokens."""
    total = 0.0
    for row, z in enumerate(student):
        known, weight = {}, 0.0
        for (log_probs, ids), share in zip(lists, shares[row], strict=True):
            own = {}
            for token, log_prob in zip(ids[row].tolist(), log_probs[row], strict=True):
                if token != -1 and share > 0:
                    own.setdefault(token, np.exp(log_prob * captured_at / temperature))
            scale = sum(own.values()) if tail == "renormalize" else 1.0
            weight += share if own else 0.0
            for token, p in own.items():
                known[token] = known.get(token, 0.0) + share * p / scale
        q = np.exp(cases.log_softmax(z / temperature))
        p, others = np.array(list(known.values())) / weight, np.delete(q, list(known)).sum()
        q = q[list(known)]
        if tail == "renormalize":
            q = q / q.sum()
        elif tail == "bucket":
            p, q = np.append(p, 1 - p.sum()), np.append(q, others)
        total += cases.DIVERGENCES[name].truth(LN(p), LN(q))[0]
    return total / len(student)


def value_and_grad(student, lists, shares, dtype=jnp.float32, at=1.0, tail="bucket", **options):
    teachers = [jaxkd.TopKLogProbs(*x, temperature=at, tail=tail) for x in lists]
    teacher = jaxkd.Mixture(teachers, None if shares is None else jnp.asarray(shares, dtype))
    return _value_and_grad(jnp.asarray(student, dtype), teacher, **options)


@partial(jax.jit, static_argnames=("sharding",))
def _value_and_grad(student, teacher, **options):
    def loss(values):
        return jaxkd.distillation_loss(jaxkd.Logits(values), teacher, chunk_size=CHUNK, **options)[0]

    return jax.value_and_grad(loss)(student)


QUARTERS = np.zeros((1, 4))
# Tokens and probabilities of two teachers, weights, tail, forward KL from the uniform student over 4 tokens.
WORKED = [
    # (1/2, 1/4, rest 1/4) and (1/2 of token 1, rest 1/2): (1/4, 3/8, rest 3/8), where the student has (1/4, 1/4, 1/2)
    ([0, 1], [0.5, 0.25], [1, -1], [0.5, 1.0], [1, 1], "bucket", 0.375 * LN(1.5) + 0.375 * LN(0.75)),
    # the first alone
    ([0, 1], [0.5, 0.25], [2, 3], [0.5, 0.4], [2, 0], "bucket", 0.5 * LN(2) + 0.25 * LN(0.5)),
    # without entries of its own the second has no say
    ([0, 1], [0.5, 0.25], [-1, -1], [0.5, 0.4], [1, 3], "bucket", 0.5 * LN(2) + 0.25 * LN(0.5)),
    # (2/3, 1/3, 0) and (0, 1/2, 1/2): (1/3, 5/12, 1/4), the student a third each
    ([0, 1], [0.5, 0.25], [1, 2], [0.3, 0.3], [1, 1], "renormalize", 5 / 12 * LN(5 / 4) + 1 / 4 * LN(3 / 4)),
    # (1/4, 3/8) over all tokens
    ([0, 1], [0.5, 0.25], [1, -1], [0.5, 1.0], [1, 1], "zero", 0.375 * LN(1.5)),
    # every token is in some list, so there is no rest: (.4, .4) and (.4, .4), renormalised
    ([0, 1], [0.4, 0.4], [2, 3], [0.4, 0.4], [1, 1], "bucket", 0.0),
]


@pytest.mark.parametrize(("first", "p", "second", "r", "weights", "tail", "value"), WORKED)
def test_worked_numbers(first, p, second, r, weights, tail, value):
    lists = [(LN([p]), np.array([first])), (LN([r]), np.array([second]))]
    loss, _ = value_and_grad(QUARTERS, lists, weights, tail=tail)
    assert float(loss) == pytest.approx(value, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize(
    ("name", "tail", "at"),
    all_but(
        [("forward_kl", "bucket", 1.5), ("total_variation", "bucket", 1.5)],
        [
            ("forward_kl", "bucket", 1.5),
            ("jensen_shannon_0.1", "bucket", 1.5),
            ("total_variation", "bucket", 1.5),
            ("reverse_kl", "renormalize", 1.0),
            ("forward_kl", "zero", 1.5),
        ],
    ),
)
def test_float64(name, tail, at, x64):
    """The value, and the gradient along a direction by central differences of the truth."""
    student, lists = logits(6), captured(at)
    options = {"divergence": cases.DIVERGENCES[name].make(), "temperature": 1.5}
    loss, gradient = value_and_grad(student, lists, SHARES, jnp.float64, at, tail, **options)

    def exact(student):
        return truth(name, tail, student, lists, SHARES, 1.5, at)

    assert float(loss) == pytest.approx(exact(student), rel=1e-11)
    direction, step = logits(7), 1e-6
    difference = (exact(student + step * direction) - exact(student - step * direction)) / (2 * step)
    assert float(np.vdot(gradient, direction)) == pytest.approx(difference, rel=1e-6)


def test_lists_of_the_same_tokens_are_the_mixture_of_whole_rows(x64):
    """Chosen by one source: the buckets of the dense mixture, and so a lower bound of its loss."""
    teachers = [jaxkd.Logits(jnp.asarray(logits(seed))) for seed in (2, 3)]
    student, weights = jaxkd.Logits(jnp.asarray(logits(6))), jnp.array([0.3, 0.7])
    tops = [jaxkd.TopKLogProbs.of(x, 9, chosen_by=student, chunk_size=CHUNK) for x in teachers]
    mixed = jnp.log(sum(w * jax.nn.softmax(x.values) for w, x in zip(weights, teachers, strict=True)))
    one = jaxkd.TopKLogProbs.of(jaxkd.Logits(mixed), 9, chosen_by=student, chunk_size=CHUNK)
    loss = jax.jit(partial(jaxkd.token_divergences, divergence=jaxkd.jensen_shannon(), chunk_size=CHUNK))
    in_buckets = loss(student, jaxkd.Mixture(tops, weights))
    np.testing.assert_allclose(in_buckets, loss(student, one), rtol=1e-11)
    assert np.all(in_buckets < loss(student, jaxkd.Mixture(teachers, weights)))


def test_other_lists_are_off_by_what_teachers_leave(x64):
    """By at most the mean of it in total variation, above what is a lower bound otherwise; full lists are exact."""
    teachers = [jaxkd.Logits(jnp.asarray(logits(seed))) for seed in (2, 3)]
    student = jaxkd.Logits(jnp.asarray(logits(6)))
    loss = jax.jit(partial(jaxkd.token_divergences, divergence=jaxkd.total_variation, chunk_size=CHUNK))
    dense = loss(student, jaxkd.Mixture(teachers))
    for k in (5, 20, V):
        tops = [jaxkd.TopKLogProbs.of(x, k, chunk_size=CHUNK) for x in teachers]
        left = 1 - np.mean([jnp.exp(x.log_probs).sum(axis=1) for x in tops], axis=0)
        assert np.all(loss(student, jaxkd.Mixture(tops)) <= dense + left + 1e-12)
    np.testing.assert_allclose(loss(student, jaxkd.Mixture(tops)), dense, rtol=1e-10)


def test_one_teacher_is_that_teacher():
    (log_probs, ids), other, _ = captured()
    want = value_and_grad(logits(6), [(log_probs, ids)], None)
    alone = _value_and_grad(jnp.asarray(logits(6), jnp.float32), jaxkd.TopKLogProbs(log_probs, ids))
    poisoned = np.full_like(other[0], np.nan), np.full_like(other[1], V + 3)
    for got in (
        alone,
        value_and_grad(logits(6), [(log_probs, ids)] * 2, [0.3, 0.6]),
        value_and_grad(logits(6), [(log_probs, ids), poisoned], [2.0, 0.0]),
    ):
        assert float(got[0]) == pytest.approx(float(want[0]), rel=1e-6)
        assert cases.relative_error(got[1], want[1]) < 3e-6


@pytest.mark.parametrize("shares", [np.zeros(3), np.array([1.0, -0.5, 1.0])])
def test_weights_that_are_none_are_no_number(shares):
    assert np.isnan(value_and_grad(logits(6), captured(), shares)[0])


def test_entries_that_are_unsound_are_no_number():
    lists = captured()
    lists[1][1][9, 2] = V
    assert np.isnan(value_and_grad(logits(6), lists, np.ones(3))[0])


def test_no_more_than_a_chunk_of_logits():
    rows, width, hidden, chunk_size = 96, 1009, 40, 16
    student = cases.head(0, rows, hidden, width).astype(jnp.float32)

    def loss(student, arrays):
        teacher = jaxkd.Mixture([jaxkd.TopKLogProbs(*x) for x in arrays])
        return jaxkd.distillation_loss(student, teacher, chunk_size=chunk_size)[0]

    arrays = [(jnp.zeros((rows, k)), jnp.zeros((rows, k), int)) for k in SIZES]
    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss))(student, arrays)
    assert jaxprs.most_rows(jaxpr, width, {(width, hidden), (hidden, width)}) == chunk_size


TOP = jaxkd.TopKLogProbs(jnp.full((2, 3), -2.0), jnp.arange(6).reshape(2, 3))
ONE = jaxkd.Logits(jnp.ones((2, 11)))
BAD = [
    (lambda: jaxkd.Mixture([TOP, ONE]), {}, TypeError, r"`teacher.teachers\[1\]` is a Logits.*TopKLogProbs.of"),
    (lambda: jaxkd.Mixture([ONE, TOP]), {}, TypeError, r"`teacher.teachers\[0\]` is a Logits.*TopKLogProbs.of"),
    (
        lambda: jaxkd.Mixture([TOP, jaxkd.TopKLogProbs(TOP.log_probs, TOP.token_ids, tail="renormalize")]),
        {},
        ValueError,
        r"`teacher.teachers\[1\].tail` is 'renormalize' but `teacher.teachers\[0\].tail` is 'bucket'",
    ),
    (
        lambda: jaxkd.Mixture([TOP, jaxkd.TopKLogProbs(TOP.log_probs, jnp.zeros((2, 2), int))]),
        {},
        ValueError,
        r"`teacher.teachers\[1\].token_ids`.*\(2, 2\)",
    ),
    (
        lambda: jaxkd.Mixture([TOP, jaxkd.TopKLogProbs(TOP.log_probs[:1], TOP.token_ids[:1])]),
        {},
        ValueError,
        r"`teacher.teachers\[1\].log_probs`.*\(1,\).*`teacher.teachers\[0\].log_probs`.*\(2,\)",
    ),
    (lambda: jaxkd.Mixture([TOP] * 2), {"temperature": 2.0}, ValueError, r"`teacher.teachers\[0\]` was captured.*2"),
    (lambda: jaxkd.Mixture([TOP] * 2, jnp.ones(3)), {}, ValueError, r"`teacher.weights`.*\(3,\).*\(2,\)"),
    (lambda: jaxkd.Mixture([TOP]), {"divergence": jaxkd.earth_mover}, ValueError, "`divergence`.*`teacher`, a Mixture"),
    (lambda: jaxkd.Mixture([TOP]), {"implementation": "triton"}, ValueError, "triton.*buckets of tokens"),
]


@pytest.mark.parametrize(("make", "options", "error", "message"), BAD)
def test_bad_input(make, options, error, message):
    with pytest.raises(error, match=message):
        jaxkd.distillation_loss(ONE, make(), **options)
