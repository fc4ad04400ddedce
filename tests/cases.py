"""Cases, and their truth in float64: dense NumPy with gradients in closed form, which shares nothing with the library.

The data looks like a model's: hidden states of unit variance, a head scaled by 1/sqrt(D), every fourth row peaked,
sizes that no block divides.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

import jaxkd

# Divergences: from the log-probabilities (N, V) of teacher and student, the value of each row and d row / d log q.


def _times(probability, x):
    """``probability * x`` with 0 * inf = 0."""
    with np.errstate(invalid="ignore"):
        return np.where(probability == 0, 0.0, probability * x)


def _log_ratio(a, b):
    """``a - b`` with 0 where both are -inf."""
    with np.errstate(invalid="ignore"):
        return np.where((a == -np.inf) & (b == -np.inf), 0.0, a - b)


def forward_kl(lp, lq):
    p = np.exp(lp)
    return _times(p, _log_ratio(lp, lq)).sum(-1), -p


def reverse_kl(lp, lq):
    q, ratio = np.exp(lq), _log_ratio(lq, lp)
    return _times(q, ratio).sum(-1), _times(q, ratio + 1)


def jensen_shannon(beta):
    def truth(lp, lq):
        p, q = np.exp(lp), np.exp(lq)
        lm = np.logaddexp(lp + np.log(beta), lq + np.log1p(-beta))
        to_p, to_q = _times(p, _log_ratio(lp, lm)), _times(q, _log_ratio(lq, lm))
        return (beta * to_p + (1 - beta) * to_q).sum(-1), (1 - beta) * to_q

    return truth


def symmetric_kl(weight):
    def truth(lp, lq):
        (forward, forward_slope), (reverse, reverse_slope) = forward_kl(lp, lq), reverse_kl(lp, lq)
        return weight * forward + (1 - weight) * reverse, weight * forward_slope + (1 - weight) * reverse_slope

    return truth


def skew_kl(alpha):
    def truth(lp, lq):
        p, q = np.exp(lp), np.exp(lq)
        m = alpha * p + (1 - alpha) * q
        lm = np.logaddexp(lp + np.log(alpha), lq + np.log1p(-alpha))
        return _times(p, _log_ratio(lp, lm)).sum(-1), -(1 - alpha) * p * q / np.where(m == 0, 1, m)

    return truth


def total_variation(lp, lq):
    p, q = np.exp(lp), np.exp(lq)
    return np.abs(p - q).sum(-1) / 2, q * np.sign(q - p) / 2


def hellinger(lp, lq):
    p, q = np.exp(lp), np.exp(lq)
    return np.square(np.sqrt(p) - np.sqrt(q)).sum(-1) / 2, (q - np.sqrt(p * q)) / 2


def alpha_divergence(alpha):
    def truth(lp, lq):
        product = np.exp(lp) ** alpha * np.exp(lq) ** (1 - alpha)
        return (1 - product.sum(-1)) / (alpha * (1 - alpha)), -product / alpha

    return truth


def alpha_beta(alpha, beta):
    def truth(lp, lq):
        p, q, s = np.exp(lp), np.exp(lq), alpha + beta
        product = p**alpha * q**beta
        return (alpha / s * p**s + beta / s * q**s - product).sum(-1) / (alpha * beta), (q**s - product) / alpha

    return truth


def overlap_nll(lp, lq):
    q, overlap = np.exp(lq), np.exp(np.minimum(lp, lq)).sum(-1)
    return -np.log(overlap), -q * ((lq < lp) + (lq == lp) / 2) / overlap[..., None]


def renyi(alpha):
    def truth(lp, lq):
        product = np.exp(lp) ** alpha * np.exp(lq) ** (1 - alpha)
        total = product.sum(-1)
        return np.log(total) / (alpha - 1), -product / total[..., None]

    return truth


class Case(NamedTuple):
    make: Callable[[], jaxkd.Divergence]
    truth: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


DIVERGENCES = {
    "forward_kl": Case(lambda: jaxkd.forward_kl, forward_kl),
    "reverse_kl": Case(lambda: jaxkd.reverse_kl, reverse_kl),
    "jensen_shannon": Case(lambda: jaxkd.jensen_shannon(), jensen_shannon(0.5)),
    "jensen_shannon_0.1": Case(lambda: jaxkd.jensen_shannon(0.1), jensen_shannon(0.1)),
    "jensen_shannon_0.9": Case(lambda: jaxkd.jensen_shannon(beta=0.9), jensen_shannon(0.9)),
    "symmetric_kl": Case(lambda: jaxkd.symmetric_kl(), symmetric_kl(0.5)),
    "symmetric_kl_0.2": Case(lambda: jaxkd.symmetric_kl(weight=0.2), symmetric_kl(0.2)),
    "skew_kl": Case(lambda: jaxkd.skew_kl(), skew_kl(0.1)),
    "skew_kl_0.7": Case(lambda: jaxkd.skew_kl(alpha=0.7), skew_kl(0.7)),
    "total_variation": Case(lambda: jaxkd.total_variation, total_variation),
    "hellinger": Case(lambda: jaxkd.hellinger, hellinger),
    "alpha_divergence": Case(lambda: jaxkd.alpha_divergence(), alpha_divergence(0.5)),
    "alpha_divergence_0.3": Case(lambda: jaxkd.alpha_divergence(alpha=0.3), alpha_divergence(0.3)),
    "alpha_beta": Case(lambda: jaxkd.alpha_beta(0.3, 0.6), alpha_beta(0.3, 0.6)),
    "overlap_nll": Case(lambda: jaxkd.overlap_nll, overlap_nll),
    "renyi": Case(lambda: jaxkd.renyi(), renyi(0.5)),
}
ONE_OF_EACH = [name for name in DIVERGENCES if not name[-1].isdigit()]
WITH_JUMPS = ("total_variation", "overlap_nll")  # whose slope is a sign, on either side where p and q nearly agree


# Models


def on_device(x: np.ndarray, dtype) -> jax.Array:
    """`jnp.asarray` is a program for each shape."""
    return jax.device_put(np.asarray(x, dtype))


@dataclass(frozen=True)
class Head:
    """The NumPy twin of `jaxkd.LinearLogits`."""

    hidden: np.ndarray
    weight: np.ndarray
    bias: np.ndarray | None = None
    scale: np.ndarray | None = None
    softcap: np.ndarray | None = None

    def map(self, function) -> "Head":
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Head(**{name: None if x is None else function(name, x) for name, x in values.items()})

    def astype(self, dtype, head_dtype=None) -> jaxkd.LinearLogits:
        """For the library: the hidden states in ``dtype``, the head in ``head_dtype`` or the same."""
        x = self.map(lambda name, x: on_device(x, dtype if name == "hidden" else head_dtype or dtype))
        return jaxkd.LinearLogits(x.hidden, x.weight, x.bias, scale=x.scale, softcap=x.softcap)

    @property
    def product(self) -> np.ndarray:
        product = self.hidden.reshape(-1, self.hidden.shape[-1]) @ self.weight.T
        return product if self.bias is None else product + self.bias

    @property
    def logits(self) -> np.ndarray:
        z = self.product * (1.0 if self.scale is None else self.scale)
        return z if self.softcap is None else self.softcap * np.tanh(z / self.softcap)

    def gradients(self, dlogits: np.ndarray, rows: np.ndarray) -> "Head":
        """From the gradient of the logits of ``rows``, that of every field."""
        used = Head(
            self.hidden.reshape(-1, self.hidden.shape[-1])[rows], self.weight, self.bias, self.scale, self.softcap
        )
        scale = 1.0 if self.scale is None else self.scale
        dz = dlogits
        dsoftcap = None
        if self.softcap is not None:
            tanh = used.logits / self.softcap
            scaled = used.product * scale / self.softcap
            dsoftcap = np.sum(dz * (tanh - scaled * (1 - tanh**2)))
            dz = dz * (1 - tanh**2)
        dproduct = dz * scale
        dhidden = np.zeros((rows.size, self.hidden.shape[-1]))
        dhidden[rows] = dproduct @ self.weight
        return Head(
            hidden=dhidden.reshape(self.hidden.shape),
            weight=dproduct.T @ used.hidden,
            bias=None if self.bias is None else dproduct.sum(0),
            scale=None if self.scale is None else np.sum(dz * used.product),
            softcap=dsoftcap,
        )


def twin(source: jaxkd.LinearLogits) -> Head:
    """The float64 twin of what the library is given, so that rounding the inputs is nobody's error."""
    return Head(source.hidden, source.weight, source.bias, source.scale, source.softcap).map(
        lambda _, x: np.asarray(x).astype(np.float64)
    )


def head(seed, shape, hidden, vocabulary, *, bias=False, scale=None, softcap=None, spread=1.0) -> Head:
    """A model's hidden states of the leading ``shape`` and its head; logits have a deviation of about ``spread``."""
    rng = np.random.default_rng(seed)
    states = rng.normal(size=(*np.atleast_1d(shape), hidden))
    flat = states.reshape(-1, hidden)
    flat[::4] *= 4
    return Head(
        states,
        spread * rng.normal(size=(vocabulary, hidden)) / np.sqrt(hidden),
        rng.normal(size=vocabulary) if bias else None,
        None if scale is None else np.float64(scale),
        None if softcap is None else np.float64(softcap),
    )


def near(student: Head, seed=7, noise=0.02) -> Head:
    """A teacher whose head is the student's with a little noise: training that has gone well."""
    rng = np.random.default_rng(seed)
    deviation = noise * student.weight.std()
    return student.map(lambda name, x: x + deviation * rng.normal(size=x.shape) if name == "weight" else x)


def some_labels(seed, shape, vocabulary, ignored=0.3, ignore_index=-100) -> np.ndarray:
    rng = np.random.default_rng(seed)
    labels = rng.integers(vocabulary, size=shape)
    return np.where(rng.random(shape) < ignored, ignore_index, labels)


# The whole loss


class Truth(NamedTuple):
    loss: float
    soft: float
    hard: float
    num_rows: int
    gradient: Head | np.ndarray  # to the student: a `Head`, or for given logits their gradient


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def distillation(
    student,
    teacher,
    labels=None,
    *,
    divergence,
    temperature=1.0,
    soft_weight=1.0,
    hard_weight=0.0,
    ignore_index=-100,
    weights=None,
    normalizer=None,
    vocabulary="truncate",
) -> Truth:
    """The loss and its gradient; ``student`` and ``teacher`` are a `Head` or logits (..., V)."""
    student_logits = student.logits if isinstance(student, Head) else student.reshape(-1, student.shape[-1])
    teacher_logits = teacher.logits if isinstance(teacher, Head) else teacher.reshape(-1, teacher.shape[-1])
    n, v = student_logits.shape
    counted = np.ones(n, bool) if labels is None else labels.reshape(-1) != ignore_index
    w = (np.ones(n) if weights is None else weights.reshape(-1).astype(np.float64))[counted]
    total = w.sum() if normalizer is None else normalizer
    w = w / total if counted.any() and total != 0 else 0 * w
    zs, zt = student_logits[counted], teacher_logits[counted]

    common = min(v, zt.shape[-1]) if vocabulary == "truncate" else max(v, zt.shape[-1])
    lp, lq = (log_softmax(_fit(z / temperature, common)) for z in (zt, zs))
    soft, slope = DIVERGENCES[divergence].truth(lp, lq)
    with np.errstate(invalid="ignore"):  # where the loss is infinite there is no gradient
        dsoft = _fit(slope - np.exp(lq) * slope.sum(-1, keepdims=True), v, fill=0.0) / temperature

    hard, dhard = np.zeros_like(soft), 0.0
    if labels is not None:
        label = (np.arange(len(zs)), labels.reshape(-1)[counted])
        log_q = log_softmax(zs)
        hard, dhard = -log_q[label], np.exp(log_q)
        dhard[label] -= 1

    dlogits = w[:, None] * (soft_weight * dsoft + hard_weight * dhard)
    if isinstance(student, Head):
        gradient = student.gradients(dlogits, counted)
    else:
        gradient = np.zeros(student_logits.shape)
        gradient[counted] = dlogits
        gradient = gradient.reshape(student.shape)
    row = soft_weight * soft + (hard_weight * hard if hard_weight else 0.0)
    return Truth((w * row).sum(), (w * soft).sum(), (w * hard).sum(), int(counted.sum()), gradient)


def _fit(x, width, fill=-np.inf):
    """The first ``width`` columns, filled up where there are fewer."""
    missing = max(width - x.shape[-1], 0)
    return np.pad(x[:, :width], ((0, 0), (0, missing)), constant_values=fill)


# Comparison


def relative_error(got, want) -> float:
    """Relative L2 error, in float64."""
    got, want = (np.asarray(x).astype(np.float64) for x in (got, want))
    return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-300))


def value_and_grad(student, teacher, labels=None, **options):
    """((loss, metrics), gradient to the student) by the library, with every option known at tracing."""

    @jax.jit
    def loss_and_gradient(student, teacher):
        return jax.value_and_grad(jaxkd.distillation_loss, has_aux=True)(student, teacher, labels, **options)

    return loss_and_gradient(student, teacher)


@partial(jax.jit, static_argnames=("ignore_index", "vocabulary", "chunk_size", "implementation"))
def traced_value_and_grad(
    student,
    teacher,
    labels=None,
    *,
    chunk_size,
    ignore_index=-100,
    vocabulary="truncate",
    implementation=None,
    **numbers,
):
    """The same with every number traced, so that it is compiled once for many tests."""
    return jax.value_and_grad(jaxkd.distillation_loss, has_aux=True)(
        student,
        teacher,
        labels,
        ignore_index=ignore_index,
        vocabulary=vocabulary,
        chunk_size=chunk_size,
        implementation=implementation,
        **numbers,
    )


def check(result, truth: Truth, *, loss, gradient):
    """Holds the library's result to the truth within these relative errors."""
    (got_loss, metrics), got = result
    scale = abs(truth.soft) + abs(truth.hard)
    assert abs(float(got_loss) - truth.loss) <= loss * max(abs(truth.loss), scale), (float(got_loss), truth.loss)
    for name in ("soft", "hard"):
        want = getattr(truth, name)
        assert abs(float(metrics[name]) - want) <= max(loss, 1e-6) * scale, (name, float(metrics[name]), want)
    assert float(metrics["num_rows"]) == truth.num_rows
    errors = gradient_errors(got, truth.gradient)
    assert max(errors.values()) <= gradient, errors


def gradient_errors(got, want) -> dict[str, float]:
    if isinstance(got, jaxkd.Logits):
        return {"values": relative_error(got.values, want)}
    return {
        f.name: relative_error(getattr(got, f.name), getattr(want, f.name))
        for f in fields(want)
        if getattr(want, f.name) is not None
    }
