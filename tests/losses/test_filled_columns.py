"""Heads that are filled up to a width that a kernel can copy: columns of no token change no number."""

from dataclasses import replace

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkd
from jaxkd.losses import flat_models

N, D, V, CHUNK = 11, 8, 101, 4
LABELS = cases.some_labels(2, N, V)
WEIGHTS = np.random.default_rng(3).uniform(0.5, 2, size=N).astype(np.float32)
TEACHER = cases.head(1, N, 5, V, bias=True).astype(jnp.float32)


def student_of(transform):
    student = cases.head(0, N, D, V, **transform).astype(jnp.float32)
    rng = np.random.default_rng(4)
    return replace(student, low_rank=tuple(jnp.asarray(rng.normal(size=x), jnp.float32) / 2 for x in ((D, 2), (2, V))))


def everything(student, labels):
    """Every loss of linear heads: the gradient of all together, and the numbers of each."""
    options = {"chunk_size": CHUNK}
    tempered = options | {"temperature": 1.5}

    def total(student):
        cross_entropy = jaxkd.cross_entropy(
            student, labels, label_smoothing=0.2, z_loss=0.1, weights=WEIGHTS, **options
        )
        distillation = jaxkd.distillation_loss(
            student, TEACHER, labels, divergence=jaxkd.jensen_shannon(), hard_weight=0.5, **tempered
        )
        rows = {
            "log_probs": jaxkd.token_log_probs(student, labels, **tempered),
            "entropies": jaxkd.token_entropies(student, **tempered),
            "divergences": jaxkd.token_divergences(student, TEACHER, divergence=jaxkd.reverse_kl, **tempered),
        }
        sums = cross_entropy[0] + distillation[0] + sum(jnp.vdot(x, WEIGHTS) for x in rows.values())
        return sums, (cross_entropy, distillation, rows)

    statistics = jaxkd.token_statistics(student, labels, TEACHER, **options)
    return jax.jit(jax.value_and_grad(total, has_aux=True))(student), statistics


@pytest.fixture
def filled(monkeypatch):
    """From here on, as for a GPU kernel: widths are multiples of 32. Which ones came is kept."""
    widths = []

    def aligned_width(implementation, chunk, divergence=None):
        widths.append(chunk.student_width)
        return -(-chunk.student_width // 32) * 32

    def start():
        monkeypatch.setattr(flat_models, "aligned_width", aligned_width)
        return widths

    return start


@pytest.mark.parametrize(
    "transform", [pytest.param({}, marks=pytest.mark.slow), {"bias": True, "scale": 0.7, "softcap": 8.0}]
)
def test_no_number_changes(transform, filled):
    student = student_of(transform)
    want = everything(student, LABELS)
    widths = filled()
    got = everything(student, LABELS)
    assert widths == [V] * 6
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert x.shape == y.shape
        assert cases.relative_error(x, y) <= 1e-5, jax.tree_util.keystr(path)


def test_a_column_of_the_filling_is_no_label(filled):
    filled()
    labels = np.where(np.arange(N) == 3, V, np.maximum(LABELS, 0))
    ((total, (cross_entropy, _, rows)), _), _ = everything(student_of({}), labels)
    assert np.isnan(total)
    assert np.isnan(cross_entropy[0])
    np.testing.assert_array_equal(np.isnan(rows["log_probs"]), np.arange(N) == 3)
