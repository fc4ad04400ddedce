"""The float64 truth of losses of one head and of numbers of rows: dense NumPy with gradients in closed form."""

from typing import NamedTuple

import cases
import numpy as np


class CrossEntropy(NamedTuple):
    loss: float
    hard: float
    log_normalizer: float
    accuracy: float
    num_rows: int
    gradient: cases.Head | np.ndarray  # to the student: a `Head`, or for given logits their gradient


def cross_entropy(
    student, labels, *, label_smoothing=0.0, z_loss=0.0, weights=None, normalizer=None, ignore_index=-100
) -> CrossEntropy:
    """``student`` is a `Head` or logits (..., V)."""
    counted = labels.reshape(-1) != ignore_index
    z, y = logits_of(student)[counted], labels.reshape(-1)[counted]
    w = (np.ones(counted.size) if weights is None else np.asarray(weights, np.float64).reshape(-1))[counted]
    total = w.sum() if normalizer is None else normalizer
    w = w / (total or 1.0)
    label, log_q = (np.arange(len(z)), y), cases.log_softmax(z)
    hard, log_normalizer = -log_q[label], np.logaddexp.reduce(z, axis=1)
    rows = (1 - label_smoothing) * hard + z_loss * log_normalizer**2
    if label_smoothing:
        rows -= label_smoothing * log_q.mean(1)
    dlogits = np.exp(log_q) * (1 + 2 * z_loss * log_normalizer[:, None]) - label_smoothing / z.shape[1]
    dlogits[label] -= 1 - label_smoothing
    accuracy = z[label] == z.max(1)
    sums = (float((w * x).sum()) for x in (rows, hard, log_normalizer, accuracy))
    return CrossEntropy(*sums, int(counted.sum()), _gradient(student, counted, w[:, None] * dlogits))


class Rows(NamedTuple):
    """One number a row, and the gradient of their sum, each times its ``upstream``."""

    values: np.ndarray
    gradient: cases.Head | np.ndarray


def log_probs(student, labels, upstream, temperature=1.0) -> Rows:
    counted = labels.reshape(-1) != -100
    log_q = cases.log_softmax(logits_of(student)[counted] / temperature)
    label = np.arange(len(log_q)), labels.reshape(-1)[counted]
    dlogits = -np.exp(log_q) / temperature
    dlogits[label] += 1 / temperature
    return _rows(student, counted, log_q[label], dlogits, upstream)


def entropies(student, mask, upstream, temperature=1.0) -> Rows:
    log_q = cases.log_softmax(logits_of(student)[mask.reshape(-1)] / temperature)
    q, log_q = np.exp(log_q), np.where(log_q == -np.inf, 0, log_q)
    values = -(q * log_q).sum(1)
    return _rows(student, mask.reshape(-1), values, -q * (log_q + values[:, None]) / temperature, upstream)


def divergences(student, teacher, mask, upstream, divergence, temperature=1.0) -> Rows:
    """Of models whose widths are equal, or of which the common first columns are compared."""
    counted = mask.reshape(-1)
    zs, zt = (logits_of(x)[counted] / temperature for x in (student, teacher))
    common, width = min(zs.shape[1], zt.shape[1]), zs.shape[1]
    log_p, log_q = cases.log_softmax(zt[:, :common]), cases.log_softmax(zs[:, :common])
    values, slope = cases.DIVERGENCES[divergence].truth(log_p, log_q)
    dlogits = (slope - np.exp(log_q) * slope.sum(1, keepdims=True)) / temperature
    return _rows(student, counted, values, np.pad(dlogits, ((0, 0), (0, width - common))), upstream)


def logits_of(source) -> np.ndarray:
    return source.logits if isinstance(source, cases.Head) else source.reshape(-1, source.shape[-1])


def _rows(student, counted, values, dlogits, upstream) -> Rows:
    spread = np.zeros(counted.size)
    spread[counted] = values
    return Rows(
        spread.reshape(upstream.shape), _gradient(student, counted, upstream.reshape(-1)[counted, None] * dlogits)
    )


def _gradient(student, counted, dlogits):
    if isinstance(student, cases.Head):
        return student.gradients(dlogits, counted)
    gradient = np.zeros(logits_of(student).shape)
    gradient[counted] = dlogits
    return gradient.reshape(student.shape)


def twin(source):
    """Of a `jaxkd.LinearLogits` or `jaxkd.Logits`."""
    return cases.twin(source) if hasattr(source, "weight") else np.asarray(source.values).astype(np.float64)


def check(result, truth: Rows, *, value, gradient):
    """Holds the library's values and gradient to the truth within these relative errors."""
    values, got = result
    assert values.shape == truth.values.shape
    assert cases.relative_error(values, truth.values) <= value
    errors = cases.gradient_errors(got, truth.gradient)
    assert max(errors.values()) <= gradient, errors


def check_cross_entropy(result, truth: CrossEntropy, *, loss, gradient):
    (got_loss, metrics), got = result
    assert set(metrics) == {"hard", "log_normalizer", "accuracy", "num_rows"}
    for name, x in ({"loss": got_loss} | metrics).items():
        want = getattr(truth, name)
        assert abs(float(x) - want) <= max(loss, 1e-6) * max(abs(want), 0.1), (name, float(x), want)
    errors = cases.gradient_errors(got, truth.gradient)
    assert max(errors.values()) <= gradient, errors
