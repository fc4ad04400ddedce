"""Divergences that are a sum over tokens, or a function of one: each is declared once, as the term of a token."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxkd.divergences.declaration import Divergence, weigh

LN2 = math.log(2)


def log_mixture_ratios(log_p: jax.Array, log_q: jax.Array, weight: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """``log(m / p)`` and ``log(m / q)`` for the mixture ``m = weight p + (1 - weight) q``.

    Exact to rounding both near ``p = q`` and where one probability underflows: the logarithm is taken of the ratio to
    the larger of the two, by `log1p` and `expm1` of their difference, and never of a probability.
    """
    both_zero = (log_p == -jnp.inf) & (log_q == -jnp.inf)
    d = jnp.where(both_zero, 0, log_q - log_p)
    # Not abs(d): its derivative at d = 0 is 0, and here it has to be that of one of the sides.
    distance = jnp.where(d > 0, d, -d)
    to_larger = jnp.log1p(jnp.where(d > 0, weight, 1 - weight) * jnp.expm1(-distance))
    to_smaller = to_larger + distance
    return jnp.where(d > 0, to_smaller, to_larger), jnp.where(d > 0, to_larger, to_smaller)


def parameter(name: str, value: ArrayLike, low: float, high: float, high_is_in: bool = True) -> Any:
    """``value`` as a Python float where it is known now (and then in range), else as it is."""
    if isinstance(value, jax.core.Tracer):
        return value
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise TypeError(f"`{name}` is {value!r}; give a number") from None
    if not (low <= number < high or (high_is_in and number == high)):
        raise ValueError(f"`{name}` is {number:g}; give a number in [{low:g}, {high:g}{']' if high_is_in else ')'}")
    return number


def _forward_kl_term(log_p, log_q):
    return weigh(jnp.exp(log_p), log_p - log_q)


def _forward_kl_kernel_form(log2_p, log2_q):
    # With q - p, which sums to 0: near p = q the errors of the two normalisers then cancel, and no term is below 0.
    p, q = jnp.exp2(log2_p), jnp.exp2(log2_q)
    return weigh(p, (log2_p - log2_q) * LN2 - 1) + q, -p


# The slope is -p.
forward_kl = Divergence(_forward_kl_term, kernel_form=_forward_kl_kernel_form, slope_sum=-1.0, is_nonnegative=True)
"""KL(P‖Q) = sum p (log p - log q), the usual distillation loss: the student covers all that the teacher does.

Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531), without its tau**2.
"""


def _reverse_kl_term(log_p, log_q):
    return weigh(jnp.exp(log_q), log_q - log_p)


def _reverse_kl_kernel_form(log2_p, log2_q):
    p, q = jnp.exp2(log2_p), jnp.exp2(log2_q)  # with p - q, as above
    log_ratio = (log2_q - log2_p) * LN2
    return weigh(q, log_ratio - 1) + p, weigh(q, log_ratio + 1)


reverse_kl = Divergence(_reverse_kl_term, kernel_form=_reverse_kl_kernel_form, is_nonnegative=True)
"""KL(Q‖P) = sum q (log q - log p): the student seeks the teacher's modes. Infinite where p = 0 < q.

Source: Gu et al., "MiniLLM" (arXiv 2306.08543).
"""


def _jensen_shannon_term(log_p, log_q, beta):
    log_m_to_p, log_m_to_q = log_mixture_ratios(log_p, log_q, beta)
    return -beta * weigh(jnp.exp(log_p), log_m_to_p) - (1 - beta) * weigh(jnp.exp(log_q), log_m_to_q)


def _jensen_shannon_slope(log_p, log_q, beta):
    _, log_m_to_q = log_mixture_ratios(log_p, log_q, beta)
    return -(1 - beta) * weigh(jnp.exp(log_q), log_m_to_q)


def _jensen_shannon_kernel_form(log2_p, log2_q, beta):
    # Probabilities below 2**-126 are 0 here and add nothing; a finite logarithm keeps 0 * inf out.
    p, q = jnp.exp2(log2_p), jnp.exp2(log2_q)
    log2_p, log2_q = jnp.maximum(log2_p, -1e4), jnp.maximum(log2_q, -1e4)
    log2_m = jnp.log2(jnp.maximum(beta * p + (1 - beta) * q, 2.0**-126))
    slope = ((1 - beta) * LN2) * (q * (log2_q - log2_m))
    term = (beta * LN2) * (p * (log2_p - log2_m)) + slope
    # Near p = q the term is the small difference of large ones: its Taylor series in d = log(q / p).
    d, w = (log2_q - log2_p) * LN2, 1 - beta
    cubic, quartic, quintic = (2 - w) / 6, (3 - (4 - 2 * w) * w) / 24, (4 - (11 - (14 - 6 * w) * w) * w) / 120
    series = beta * w * p * (d * d) * (0.5 + d * (cubic + d * (quartic + d * quintic)))
    return jnp.where(jnp.abs(d) < 0.2, series, term), slope


def jensen_shannon(beta: ArrayLike = 0.5) -> Divergence:
    """The generalised Jensen-Shannon divergence, ``beta`` being the weight of the teacher.

    JSD = beta KL(P‖M) + (1 - beta) KL(Q‖M), M = beta P + (1 - beta) Q; at most log 2.

    ``beta=0`` is forward KL and ``beta=1`` reverse KL, as in GKD, TRL and Liger Kernel; the formula itself tends to 0
    there, so the two ends are recognised when ``beta`` is known at tracing. A traced ``beta`` stays strictly inside.

    Source: Agarwal et al., "On-Policy Distillation of Language Models" (GKD, arXiv 2306.13649).

    Raises:
      ValueError: ``beta`` is outside [0, 1].

    >>> p, q = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75]))
    >>> print(f"{jensen_shannon(0.5)(p, q):.6f} {forward_kl(p, q):.6f} {reverse_kl(p, q):.6f}")
    0.033822 0.143841 0.130812
    """
    beta = parameter("beta", beta, 0.0, 1.0)
    if isinstance(beta, float) and beta in (0, 1):
        return reverse_kl if beta else forward_kl
    return Divergence(
        _jensen_shannon_term, (beta,), _jensen_shannon_slope, _jensen_shannon_kernel_form, is_nonnegative=True
    )


def _symmetric_kl_term(log_p, log_q, weight):
    return weight * _forward_kl_term(log_p, log_q) + (1 - weight) * _reverse_kl_term(log_p, log_q)


def symmetric_kl(weight: ArrayLike = 0.5) -> Divergence:
    """weight KL(P‖Q) + (1 - weight) KL(Q‖P): half of Jeffreys' divergence at 0.5.

    Source: Jeffreys, "An invariant form for the prior probability in estimation problems", 1946.

    Raises:
      ValueError: ``weight`` is outside [0, 1].

    >>> p, q = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75]))
    >>> print(f"{symmetric_kl(0.5)(p, q):.6f}")
    0.137327
    """
    weight = parameter("weight", weight, 0.0, 1.0)
    if isinstance(weight, float) and weight in (0, 1):
        return forward_kl if weight else reverse_kl
    return Divergence(_symmetric_kl_term, (weight,), is_nonnegative=True)


def _skew_kl_term(log_p, log_q, alpha):
    return -weigh(jnp.exp(log_p), log_mixture_ratios(log_p, log_q, alpha)[0])


def skew_kl(alpha: ArrayLike = 0.1) -> Divergence:
    """KL(P‖alpha P + (1 - alpha) Q); ``alpha=0`` is forward KL. Finite wherever ``alpha > 0``: at most -log alpha.

    Source: Ko et al., "DistiLLM" (arXiv 2402.03898).

    Raises:
      ValueError: ``alpha`` is outside [0, 1).

    >>> p, q = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75]))
    >>> print(f"{skew_kl(0.1)(p, q):.6f}")
    0.113137
    """
    alpha = parameter("alpha", alpha, 0.0, 1.0, high_is_in=False)
    if isinstance(alpha, float) and alpha == 0:
        return forward_kl
    return Divergence(_skew_kl_term, (alpha,), is_nonnegative=True)


def _total_variation_term(log_p, log_q):
    return jnp.abs(jnp.exp(log_p) - jnp.exp(log_q)) / 2


def total_variation_slope(log_p, log_q):
    # Probabilities that agree to rounding are equal: the sign of their difference would be that of the rounding.
    rounding = 3 * jnp.finfo(log_q.dtype).eps * jnp.maximum(jnp.abs(log_q), 1)
    difference = log_q - log_p
    sign = jnp.where(difference > rounding, 0.5, jnp.where(difference < -rounding, -0.5, 0))
    return jnp.exp(log_q) * sign


total_variation = Divergence(_total_variation_term, slope=total_variation_slope, is_nonnegative=True)
"""1/2 sum |p - q|, at most 1; its slope is 0 where p = q.

Source: Wen et al., "f-Divergence Minimization for Sequence-Level Knowledge Distillation" (arXiv 2307.15190).
"""


def _hellinger_term(log_p, log_q):
    return jnp.square(jnp.exp(log_p / 2) - jnp.exp(log_q / 2)) / 2


hellinger = Divergence(_hellinger_term, is_nonnegative=True)
"""The squared Hellinger distance 1/2 sum (sqrt p - sqrt q)^2, at most 1.

Source: Hellinger, "Neue Begründung der Theorie quadratischer Formen von unendlichvielen Veränderlichen", 1909.
"""


def alpha_divergence_term(log_p, log_q, alpha):
    """(alpha p + (1 - alpha) q - p^alpha q^(1 - alpha)) / (alpha (1 - alpha)): >= 0, and of second order where p = q.

    alpha p + (1 - alpha) q sums to 1, so the sum over tokens is that of the definition. To keep its digits for every
    ``alpha`` it is ``(b - a - (a^(1 - c) b^c - a) / c) / (1 - c)``: ``c = min(alpha, 1 - alpha)``, and a, b = q, p or,
    where alpha > 1/2, p, q. Only c can be small, and `expm1` has the difference over it. Near p = q the two differences
    cancel, and their Taylor series in ``d = log(b / a)`` is summed:
    ``a d^2 (1/2! + (1 + c) d/3! + (1 + c + c^2) d^2/4! + ...)``.
    """
    swap = alpha > 0.5
    log_a, log_b = jnp.where(swap, log_p, log_q), jnp.where(swap, log_q, log_p)
    c = jnp.minimum(alpha, 1 - alpha)
    both_zero = (log_p == -jnp.inf) & (log_q == -jnp.inf)
    d = jnp.where(both_zero, 0, log_b - log_a)
    log_product = jnp.where(both_zero, -jnp.inf, (1 - c) * log_a + c * log_b)
    a, b, product = jnp.exp(log_a), jnp.exp(log_b), jnp.exp(log_product)

    def minus_a(x, log_ratio):
        return jnp.where(jnp.abs(log_ratio) < 1, a * jnp.expm1(jnp.clip(log_ratio, -1, 1)), x - a)

    far = (minus_a(b, d) - minus_a(product, c * d) / c) / (1 - c)
    num_terms = jnp.finfo(log_p.dtype).bits // 4  # what is left out is less than a rounding
    powers = [jnp.ones_like(c)]  # 1 + c + c^2 + ...
    while len(powers) < num_terms:
        powers.append(1 + c * powers[-1])
    is_near, d = jnp.maximum(1, jnp.abs(c)) * jnp.abs(d) < 0.5, jnp.clip(d, -0.5, 0.5)
    series = powers[-1] / math.factorial(num_terms + 1)
    for k in reversed(range(num_terms - 1)):
        series = series * d + powers[k] / math.factorial(k + 2)
    return jnp.where(is_near, a * (d * d) * series, far)


def alpha_divergence(alpha: ArrayLike = 0.5) -> Divergence:
    """Amari's alpha-divergence (1 - sum p^alpha q^(1 - alpha)) / (alpha (1 - alpha)).

    ``alpha=1`` is forward KL and ``alpha=0`` reverse KL, its limits, recognised when ``alpha`` is known at tracing; a
    traced ``alpha`` is any number but these, and keeps its digits near them. 0.5 is four times `hellinger`.

    Source: Amari, "Differential-Geometrical Methods in Statistics", 1985.

    Raises:
      ValueError: ``alpha`` is not finite.

    >>> p, q = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75]))
    >>> print(f"{alpha_divergence(0.5)(p, q):.6f} {hellinger(p, q):.6f} {total_variation(p, q):.6f}")
    0.136297 0.034074 0.250000
    """
    alpha = parameter("alpha", alpha, -jnp.inf, jnp.inf, high_is_in=False)
    if isinstance(alpha, float) and alpha in (0, 1):
        return forward_kl if alpha else reverse_kl
    return Divergence(alpha_divergence_term, (alpha,), is_nonnegative=True)


def _alpha_beta_term(log_p, log_q, alpha, beta):
    """p^s g(d), with s = alpha + beta, d = log(q / p) and g(d) = ((e^(s d) - 1) / s - (e^(beta d) - 1) / beta) / alpha.

    Near p = q the difference cancels, and its Taylor series is summed: ``d^2 (c_2/2! + c_3 d/3! + ...)`` with
    c_2 = 1 and c_(k+1) = s^(k-1) + beta c_k, which knows no division by alpha or beta.
    """
    alpha, beta = (jnp.asarray(x, log_p.dtype) for x in (alpha, beta))
    s = alpha + beta
    both_zero = (log_p == -jnp.inf) & (log_q == -jnp.inf)
    d = jnp.where(both_zero, 0, log_q - log_p)
    p_s, q_s = jnp.exp(s * log_p), jnp.exp(s * log_q)
    product = jnp.where(both_zero, 0, jnp.exp(weigh(alpha, log_p) + weigh(beta, log_q)))
    by_beta = jnp.where(beta == 0, weigh(p_s, d), (product - p_s) / jnp.where(beta == 0, 1, beta))
    far = ((q_s - p_s) / s - by_beta) / jnp.where(alpha == 0, 1, alpha)
    far = jnp.where(alpha == 0, (weigh(q_s, d) - (q_s - p_s) / s) / s, far)
    num_terms = jnp.finfo(log_p.dtype).bits // 4  # what is left out is less than a rounding
    factors, power = [jnp.ones_like(s)], jnp.ones_like(s)
    while len(factors) < num_terms:
        power = power * s
        factors.append(power + beta * factors[-1])
    is_near, d = jnp.maximum(1, s) * jnp.abs(d) < 0.5, jnp.clip(d, -0.5, 0.5)
    series = factors[-1] / math.factorial(num_terms + 1)
    for k in reversed(range(num_terms - 1)):
        series = series * d + factors[k] / math.factorial(k + 2)
    return jnp.where(is_near, p_s * (d * d) * series, far)


def _alpha_beta_slope(log_p, log_q, alpha, beta):
    """(q^s - p^alpha q^beta) / alpha."""
    alpha, beta = (jnp.asarray(x, log_p.dtype) for x in (alpha, beta))
    s = alpha + beta
    both_zero = (log_p == -jnp.inf) & (log_q == -jnp.inf)
    d = jnp.where(both_zero, 0, log_q - log_p)
    q_s = jnp.exp(s * log_q)
    product = jnp.where(both_zero, 0, jnp.exp(weigh(alpha, log_p) + weigh(beta, log_q)))
    near = -q_s * jnp.expm1(jnp.clip(-alpha * d, -1, 1))
    slope = jnp.where(jnp.abs(alpha * d) < 1, near, q_s - product) / jnp.where(alpha == 0, 1, alpha)
    return jnp.where(alpha == 0, weigh(q_s, d), slope)


def alpha_beta(alpha: ArrayLike, beta: ArrayLike) -> Divergence:
    """The alpha-beta divergence, whose two exponents weigh by how hard and how confident the student is pulled.

    -1 / (alpha beta) sum [p^alpha q^beta - alpha / s p^s - beta / s q^s], s = alpha + beta, and its limits where alpha
    or beta is 0: (1, 0) is forward KL and (0, 1) reverse KL, and (alpha, 1 - alpha) is `alpha_divergence`.

    Source: Cichocki, Cruces, Amari, "Generalized Alpha-Beta Divergences", 2011; Wang et al., "ABKD" (ICML 2025).

    Raises:
      ValueError: a parameter is negative or not finite, or both are 0.

    >>> p, q = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75]))
    >>> print(f"{alpha_beta(0.5, 0.5)(p, q):.6f} {alpha_beta(1.0, 1.0)(p, q):.6f}")
    0.136297 0.062500
    """
    alpha = parameter("alpha", alpha, 0.0, math.inf, high_is_in=False)
    beta = parameter("beta", beta, 0.0, math.inf, high_is_in=False)
    if isinstance(alpha, float) and isinstance(beta, float):
        if alpha == beta == 0:
            raise ValueError("`alpha` and `beta` are both 0; give one above 0")
        if (alpha, beta) in ((1, 0), (0, 1)):
            return forward_kl if alpha else reverse_kl
    return Divergence(_alpha_beta_term, (alpha, beta), _alpha_beta_slope, is_nonnegative=True)
