"""The divergences: numbers worked by hand, the laws they obey, limits, outside implementations."""

import inspect
import math

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.spatial.distance
import scipy.special
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxkd

ln, sqrt = math.log, math.sqrt

# P = (1/2, 1/2), Q = (1/4, 3/4): the divergence D, and its gradient to the student's first logit, which for two tokens
# is q_1 q_2 (dD/dq_1 - dD/dq_2) = 3/16 (...); that to the second is its opposite.
WORKED = {
    "forward_kl": (ln(4 / 3) / 2, 1 / 4 - 1 / 2),
    "reverse_kl": (ln(1 / 2) / 4 + 3 * ln(3 / 2) / 4, 3 / 16 * (ln(1 / 2) - ln(3 / 2))),
    "jensen_shannon": (
        ln(4 / 3) / 4 + ln(4 / 5) / 4 + ln(2 / 3) / 8 + 3 * ln(6 / 5) / 8,
        3 / 16 * (ln(2 / 3) - ln(6 / 5)) / 2,
    ),
    "symmetric_kl": (
        (ln(4 / 3) / 2 + ln(1 / 2) / 4 + 3 * ln(3 / 2) / 4) / 2,
        (-1 / 4 + 3 / 16 * (ln(1 / 2) - ln(3 / 2))) / 2,
    ),
    "skew_kl": (ln(0.5 / 0.275) / 2 + ln(0.5 / 0.725) / 2, 3 / 16 * 0.9 * (-0.5 / 0.275 + 0.5 / 0.725)),
    "total_variation": (1 / 4, 3 / 16 * (-1 / 2 - 1 / 2)),
    "hellinger": (1 - sqrt(1 / 8) - sqrt(3 / 8), 3 / 16 * (-sqrt(2) / 2 + sqrt(2 / 3) / 2)),
    "alpha_divergence": (4 * (1 - sqrt(1 / 8) - sqrt(3 / 8)), 3 / 16 * 2 * (-sqrt(2) + sqrt(2 / 3))),
    "alpha_beta": (
        (2 * 0.5**0.9 / 3 + 2 * (0.25**0.9 + 0.75**0.9) / 3 - 0.5**0.3 * (0.25**0.6 + 0.75**0.6)) / 0.18,
        3 / 16 * (0.25**-0.1 - 0.75**-0.1 - 0.5**0.3 * (0.25**-0.4 - 0.75**-0.4)) / 0.3,
    ),
    "overlap_nll": (ln(4 / 3), 3 / 16 * -4 / 3),
    "renyi": (
        -2 * ln(sqrt(1 / 8) + sqrt(3 / 8)),
        3 / 16 * (sqrt(2 / 3) - sqrt(2)) / (sqrt(1 / 8) + sqrt(3 / 8)),
    ),
}

# P = (1, 0) against Q = (1/2, 1/2), and against Q = (0, 1).
DETERMINISTIC = {
    "forward_kl": (ln(2), math.inf),
    "reverse_kl": (math.inf, math.inf),
    "jensen_shannon": (3 * ln(4 / 3) / 4, ln(2)),
    "symmetric_kl": (math.inf, math.inf),
    "skew_kl": (-ln(0.55), ln(10)),
    "total_variation": (1 / 2, 1.0),
    "hellinger": (1 - sqrt(1 / 2), 1.0),
    "alpha_divergence": (4 * (1 - sqrt(1 / 2)), 4.0),
    "alpha_beta": ((1 / 3 + 4 * 0.5**0.9 / 3 - 0.5**0.6) / 0.18, 1 / 0.18),
    "overlap_nll": (ln(2), math.inf),
    "renyi": (ln(2), math.inf),
}


@jax.jit
def value_and_gradient(divergence, teacher, student):
    """The mean divergence of the rows and its gradient to the student, through the public function.

    It is compiled once for a term and a shape: the parameters are traced.
    """

    def soft_loss(student):
        return jaxkd.distillation_loss(jaxkd.Logits(student), jaxkd.Logits(teacher), divergence=divergence)[0]

    return jax.value_and_grad(soft_loss)(student)


def soft_loss(divergence, teacher, student):
    return value_and_gradient(divergence, teacher, student)[0]


def log(*probabilities):
    return jnp.log(jnp.array([probabilities]))


@pytest.mark.parametrize("name", WORKED)
def test_worked_by_hand(name):
    value, slope = value_and_gradient(cases.DIVERGENCES[name].make(), log(0.5, 0.5), log(0.25, 0.75))
    want, first = WORKED[name]
    np.testing.assert_allclose(value, want, rtol=2e-6)
    np.testing.assert_allclose(slope, [[first, -first]], rtol=2e-6)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_worked_by_hand_without_probability(name):
    divergence = cases.DIVERGENCES[name].make()
    half, disjoint = DETERMINISTIC[name]
    np.testing.assert_allclose(soft_loss(divergence, log(1.0, 0.0), log(0.5, 0.5)), half, rtol=2e-6)
    np.testing.assert_allclose(soft_loss(divergence, log(1.0, 0.0), log(0.0, 1.0)), disjoint, rtol=2e-6)


rows = hnp.arrays(np.float32, (3, 11), elements=st.floats(-60, 60, width=32))
BOUNDS = {"jensen_shannon": ln(2), "total_variation": 1.0, "hellinger": 1.0, "alpha_divergence": 4.0, "skew_kl": ln(10)}


@jax.jit
def rounding(divergence, teacher, student, units):
    """How far the mean of float32 rows may be off, to first order.

    In units in the last place (eps / 2 of the value) a log-probability ``x`` is off by ``|x|``, its own rounding, and
    its row's normaliser by 12: a sum of eleven exponentials, which are the same ones in any order (10), and the
    logarithm of a number up to eleven (2). ``units`` are those that the logits were off before.
    """
    log_p, log_q = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
    off_p, off_q = (jnp.finfo(x.dtype).eps / 2 * (jnp.abs(x) + 12 + units) for x in (log_p, log_q))

    def moves(log_q):
        zero = jnp.zeros_like(log_q)
        by_p, by_q = (
            jax.jvp(lambda p, q: divergence.term(p, q, *divergence.parameters), (log_p, log_q), tangents)[1]
            for tangents in ((off_p, zero), (zero, off_q))
        )
        return jnp.abs(by_p) + jnp.abs(by_q)

    # On either side, since the total variation has no slope between them.
    off = jnp.sum(jnp.maximum(moves(log_q - off_q), moves(log_q + off_q)), axis=-1)
    total = jnp.sum(divergence.terms(log_p, log_q), axis=-1)
    outer = jnp.maximum(jnp.abs(divergence.outer_slope(total)), jnp.abs(divergence.outer_slope(total + off)))
    return jnp.mean(outer * (off if divergence.outer is None else off + 12 * jnp.finfo(total.dtype).eps * total))


@given(teacher=rows, student=rows)
def test_laws(teacher, student):
    permutation = np.random.default_rng(0).permutation(11)
    for name in cases.ONE_OF_EACH:
        divergence = cases.DIVERGENCES[name].make()
        value, dz = value_and_gradient(divergence, teacher, student)
        assert 0 <= value <= BOUNDS.get(name, math.inf) * (1 + 1e-6), name
        # No outer function that there is has a steeper slope.
        steepest = 1 if divergence.outer is None else np.exp(min(3 * value, 80))
        np.testing.assert_allclose(dz.sum(-1), 0, atol=2e-6 * (1 + 3 * value) * steepest, err_msg=name)
        shifted = soft_loss(divergence, teacher + 3, student - 2)
        permuted = soft_loss(divergence, teacher[:, permutation], student[:, permutation])
        # Both sides of a comparison are off; a logit as large as 63 is rounded where it is shifted.
        for other, units in ((shifted, 63.0), (permuted, 0.0)):
            bound = 2 * float(rounding(divergence, teacher, student, units))
            if divergence.outer is not None and not bound < 0.1:
                continue  # where the sum is next to a pole of the outer function its rounding is all there is
            np.testing.assert_allclose(other, value, rtol=0, atol=bound, err_msg=name)


@given(logits=rows)
def test_zero_of_a_distribution_to_itself(logits):
    for name, case in cases.DIVERGENCES.items():
        value, dz = value_and_gradient(case.make(), logits, logits)
        assert 0 <= value <= 1e-6, name
        assert np.abs(dz).max() < 1e-6, name


def test_alpha_divergence_keeps_its_digits():
    """Term and slope are right to float32 rounding at any distance and any alpha, its ends' surroundings included."""
    alphas = np.array([0.5, 0.3, 1e-4, 1 - 1e-4, -1.0, 2.0])
    rng = np.random.default_rng(0)
    gaps = np.array([3, 1, 0.1, 0.01, 1e-3])[:, None, None]
    z = rng.normal(scale=3, size=(5, 7, 211))
    log_p, log_q = (jax.nn.log_softmax(jnp.asarray(x, jnp.float32)) for x in (z, z + gaps * rng.normal(size=z.shape)))

    @jax.jit
    @jax.vmap
    def term_and_slope(alpha):
        return jaxkd.alpha_divergence(alpha).term_and_slope(log_p, log_q)

    terms, slopes = term_and_slope(np.float32(alphas))
    for alpha, term, slope in zip(np.float64(np.float32(alphas)), terms, slopes, strict=True):
        lp, lq = np.longdouble(log_p), np.longdouble(log_q)
        product = np.exp(alpha * lp + (1 - alpha) * lq)
        want = (alpha * np.exp(lp) + (1 - alpha) * np.exp(lq) - product) / (alpha * (1 - alpha))
        for i in range(len(gaps)):
            np.testing.assert_allclose(np.float64(term[i]).sum(-1), want[i].sum(-1), rtol=1e-6, err_msg=f"{alpha}")
            want_slope = (np.exp(lq[i]) - product[i]) / alpha
            assert cases.relative_error(slope[i], want_slope) <= 1e-6, alpha


SYMMETRIC = ["jensen_shannon", "symmetric_kl", "total_variation", "hellinger", "alpha_divergence"]


@pytest.mark.parametrize("name", SYMMETRIC)
def test_symmetric(name, x64):
    p, q = np.random.default_rng(0).normal(scale=3, size=(2, 5, 17))
    divergence = cases.DIVERGENCES[name].make()
    np.testing.assert_allclose(soft_loss(divergence, p, q), soft_loss(divergence, q, p), rtol=1e-12)


@pytest.mark.parametrize("gap", [3.0, 1e-3])
@pytest.mark.parametrize("name", cases.ONE_OF_EACH)
def test_neither_a_shift_nor_the_order_matters(name, gap, x64):
    """The laws again to the digits of float64, near the teacher too."""
    p, noise = np.random.default_rng(0).normal(scale=3, size=(2, 5, 17))
    q, order = p + gap * noise, np.random.default_rng(1).permutation(17)
    divergence = cases.DIVERGENCES[name].make()
    value = soft_loss(divergence, p, q)
    np.testing.assert_allclose(soft_loss(divergence, p + 3, q - 2), value, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(soft_loss(divergence, p[:, order], q[:, order]), value, rtol=1e-12, atol=1e-14)


MIRRORED = [
    (jaxkd.jensen_shannon, 0.2),
    (jaxkd.symmetric_kl, 0.2),
    (jaxkd.alpha_divergence, 0.2),
]


@pytest.mark.parametrize(("family", "parameter"), MIRRORED)
def test_mirrored_parameter_swaps_teacher_and_student(family, parameter, x64):
    p, q = np.random.default_rng(0).normal(scale=3, size=(2, 5, 17))
    np.testing.assert_allclose(soft_loss(family(parameter), p, q), soft_loss(family(1 - parameter), q, p), rtol=1e-12)


ENDS = [
    (jaxkd.jensen_shannon, 0, jaxkd.forward_kl),
    (jaxkd.jensen_shannon, 1, jaxkd.reverse_kl),
    (jaxkd.jensen_shannon, 0.0, jaxkd.forward_kl),
    (jaxkd.jensen_shannon, 1.0, jaxkd.reverse_kl),
    (jaxkd.symmetric_kl, 0, jaxkd.reverse_kl),
    (jaxkd.symmetric_kl, 1, jaxkd.forward_kl),
    (jaxkd.skew_kl, 0, jaxkd.forward_kl),
    (jaxkd.alpha_divergence, 0, jaxkd.reverse_kl),
    (jaxkd.alpha_divergence, 1, jaxkd.forward_kl),
]


@pytest.mark.parametrize(("family", "end", "limit"), ENDS)
def test_ends_are_the_limits(family, end, limit):
    assert family(end) == limit


@pytest.mark.parametrize(("family", "end", "limit"), ENDS[4:])
def test_ends_are_approached(family, end, limit, x64):
    p, q = np.random.default_rng(0).normal(size=(2, 5, 17))
    inside = family(abs(end - 1e-6))
    np.testing.assert_allclose(soft_loss(inside, p, q), soft_loss(limit, p, q), rtol=1e-4)


@pytest.mark.parametrize(("beta", "limit"), [(1e-7, jaxkd.forward_kl), (1 - 1e-7, jaxkd.reverse_kl)])
def test_jensen_shannon_over_its_vanishing_weight_tends_to_its_end(beta, limit, x64):
    p, q = np.random.default_rng(0).normal(size=(2, 5, 17))
    value = soft_loss(jaxkd.jensen_shannon(beta), p, q) / min(beta, 1 - beta)
    np.testing.assert_allclose(value, soft_loss(limit, p, q), rtol=1e-5)


@pytest.mark.parametrize("name", cases.DIVERGENCES)
def test_defaults_and_truth_in_float64(name, x64):
    p, q = np.random.default_rng(0).normal(scale=4, size=(2, 5, 17))
    truth = cases.distillation(q, p, divergence=name)
    value, gradient = value_and_gradient(cases.DIVERGENCES[name].make(), p, q)
    np.testing.assert_allclose(value, truth.loss, rtol=1e-12)
    assert cases.relative_error(gradient, truth.gradient) < 1e-12


def declares_slope():
    return [name for name in cases.DIVERGENCES if cases.DIVERGENCES[name].make().slope is not None]


@pytest.mark.parametrize("name", declares_slope())
def test_declared_slope_is_the_derived_one(name, x64):
    divergence = cases.DIVERGENCES[name].make()
    derived = jaxkd.Divergence(divergence.term, divergence.parameters, outer=divergence.outer)
    p, q = np.random.default_rng(0).normal(scale=4, size=(2, 5, 17))
    (value, gradient), (same, derived_gradient) = (value_and_gradient(d, p, q) for d in (divergence, derived))
    np.testing.assert_allclose(value, same, rtol=1e-14)
    assert cases.relative_error(gradient, derived_gradient) < 1e-12


def test_parameters_are_named_by_the_literature():
    assert list(inspect.signature(jaxkd.jensen_shannon).parameters) == ["beta"]
    assert list(inspect.signature(jaxkd.symmetric_kl).parameters) == ["weight"]
    assert list(inspect.signature(jaxkd.skew_kl).parameters) == ["alpha"]
    assert list(inspect.signature(jaxkd.alpha_divergence).parameters) == ["alpha"]


def pearson(log_p, log_q, strength):
    return strength * jnp.exp(log_q) * jnp.expm1(log_p - log_q) ** 2


def test_divergence_of_ones_own(x64):
    p, q = np.random.default_rng(0).normal(size=(2, 5, 17))
    value, gradient = value_and_gradient(jaxkd.Divergence(pearson, (0.5,)), p, q)
    probability_p, probability_q = (scipy.special.softmax(z, -1) for z in (p, q))
    ratio = probability_p / probability_q
    slope = probability_q * (1 - ratio**2) / 2
    np.testing.assert_allclose(value, (probability_q * (ratio - 1) ** 2).sum(-1).mean() / 2, rtol=1e-12)
    np.testing.assert_allclose(gradient, (slope - probability_q * slope.sum(-1, keepdims=True)) / 5, rtol=1e-9)


def test_a_term_that_exec_defined():
    """Its module has no name."""
    namespace = {}
    exec("def term(log_p, log_q):\n    return abs(log_p - log_q)", namespace)
    log_p, log_q = jnp.array([0.0, -1.0, -jnp.inf]), jnp.array([-2.0, -1.0, -jnp.inf])
    assert jaxkd.Divergence(namespace["term"])(log_p, log_q) == 2


def test_scipy(x64):
    p, q = np.random.default_rng(0).normal(scale=3, size=(2, 5, 17))
    probability_p, probability_q = (scipy.special.softmax(z, -1) for z in (p, q))
    kl = scipy.special.rel_entr
    np.testing.assert_allclose(soft_loss(jaxkd.forward_kl, p, q), kl(probability_p, probability_q).sum(-1).mean())
    np.testing.assert_allclose(soft_loss(jaxkd.reverse_kl, p, q), kl(probability_q, probability_p).sum(-1).mean())
    jsd = scipy.spatial.distance.jensenshannon(probability_p, probability_q, axis=-1) ** 2
    np.testing.assert_allclose(soft_loss(jaxkd.jensen_shannon(0.5), p, q), jsd.mean())


def test_torch():
    torch = pytest.importorskip("torch")
    p, q = np.random.default_rng(0).normal(scale=3, size=(2, 5, 17)).astype(np.float32)
    log_p, log_q = (torch.log_softmax(torch.tensor(z), -1) for z in (p, q))
    kl_div = torch.nn.functional.kl_div
    forward = kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    reverse = kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    np.testing.assert_allclose(soft_loss(jaxkd.forward_kl, p, q), forward.item(), rtol=1e-5)
    np.testing.assert_allclose(soft_loss(jaxkd.reverse_kl, p, q), reverse.item(), rtol=1e-5)
