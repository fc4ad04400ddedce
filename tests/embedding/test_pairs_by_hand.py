"""Losses of all pairs, of classes and of a teacher's scores: by hand, against optax, and against each other."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from embedding_cases import LABELS, SCORES, B, batch
from quick_programs import at_once

import jaxkd
from jaxkd import embedding

optax = pytest.importorskip("optax")


def quickly(function, *args, **options):
    return at_once({"it": partial(function, *args, **options)})["it"]


# NT-Xent and triplets of optax


@pytest.mark.parametrize("labels", [LABELS, np.arange(B) // 2, np.arange(B) % 2], ids=["some", "two each", "two"])
def test_nt_xent_is_that_of_optax(labels, x64):
    anchors, _, _ = batch()
    ours, theirs = (
        jax.jit(jax.value_and_grad(f))(anchors)
        for f in (
            lambda x: embedding.nt_xent(x, labels, temperature=0.3)[0],
            lambda x: optax.losses.ntxent(x, jnp.asarray(labels), 0.3),
        )
    )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), ours, theirs)


def test_nt_xent_of_one_class_or_of_none_twice():
    anchors, _, _ = batch(dtype=np.float32)
    for labels in (np.zeros(B, int), np.arange(B)):
        (loss, _), gradient = quickly(
            jax.value_and_grad(partial(embedding.nt_xent, labels=labels), has_aux=True), jnp.asarray(anchors)
        )
        assert float(loss) == 0
        assert not np.asarray(gradient).any()


def test_nt_xent_of_two_views_is_that_of_simclr(x64):
    """The cross-entropy of each row's cosines to all others with its other view."""
    first, second, _ = batch()
    rows = np.concatenate([first, second])
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    logits = jnp.asarray(unit @ unit.T / 0.5 - np.diag([np.inf] * 2 * B))
    exact = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.roll(jnp.arange(2 * B), B)).mean()
    loss, _ = quickly(embedding.nt_xent, rows, np.tile(np.arange(B), 2), temperature=0.5)
    assert float(loss) == pytest.approx(float(exact), rel=1e-12)


def test_triplets_are_those_of_optax(x64):
    anchors, positives, negatives = batch()
    rows = anchors, positives, negatives[:, 0]
    ours, theirs = (
        jax.jit(jax.value_and_grad(f))(rows)
        for f in (
            lambda x: embedding.triplet(*x, margin=0.7)[0],
            lambda x: optax.losses.triplet_margin_loss(*x, margin=0.7, eps=0.0).mean(),
        )
    )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), ours, theirs)


# All pairs

LINE, CLASSES = jnp.array([[0.0], [4.0], [1.0], [9.0], [5.0]]), jnp.array([0, 0, 1, 1, 2])


def test_semi_hard_by_hand():
    """Pairs (0, 4), (4, 0), (1, 9), (9, 1). 0: others at 1, 9, 5, the first beyond 4 at 5. 4: at 3, 5, 1, so 5. 1: at
    1, 3, 4, none beyond 8, the farthest at 4. 9: at 9, 5, 4, so 9."""
    loss, metrics = quickly(embedding.batch_semi_hard_triplet, LINE, CLASSES, margin=2.0)
    assert float(loss) == pytest.approx(((4 - 5 + 2) + (4 - 5 + 2) + (8 - 4 + 2) + (8 - 9 + 2)) / 4)
    assert {name: float(x) for name, x in metrics.items()} == pytest.approx(
        {"positive_distance": 6, "negative_distance": 5.75, "accuracy": 0.75, "num_rows": 4, "num_pairs": 4}
    )
    soft, _ = quickly(embedding.batch_semi_hard_triplet, LINE, CLASSES, margin=None)
    assert float(soft) == pytest.approx((3 * math.log1p(math.exp(-1)) + math.log1p(math.exp(4))) / 4)


def test_all_by_hand():
    """0: 4 + 1 - (1, 9, 5) is 4, -4, 0. 4: 5 - (3, 5, 1): 2, 0, 4. 1: 9 - (1, 3, 4): 8, 6, 5. 9: 9 - (9, 5, 4):
    0, 4, 5. What is exactly 0 is not among those that are divided by."""
    loss, metrics = quickly(embedding.batch_all_triplet, LINE, CLASSES, margin=1.0)
    assert float(loss) == pytest.approx((4 + 2 + 4 + 8 + 6 + 5 + 4 + 5) / 8)
    assert (float(metrics["active"]), float(metrics["num_rows"]), float(metrics["num_triplets"])) == (
        pytest.approx(8 / 12),
        4,
        12,
    )
    divided, _ = quickly(embedding.batch_all_triplet, LINE, CLASSES, margin=1.0, normalizer=12.0)
    assert float(divided) == pytest.approx(38 / 12)
    weighted, metrics = quickly(
        embedding.batch_all_triplet, LINE, CLASSES, margin=1.0, weights=jnp.array([3.0, 0.5, 1.0, 1.0, 0.0])
    )  # without 5: 0 has 4; 4 has 2 and 0; 1 has 8, 6; 9 has 0, 4
    assert float(weighted) == pytest.approx((3 * 4 + 0.5 * 2 + 8 + 6 + 4) / (3 + 0.5 + 1 + 1 + 1))
    assert float(metrics["num_triplets"]) == 8


@pytest.mark.parametrize("name", ["batch_semi_hard_triplet", "batch_all_triplet"])
def test_of_one_class_or_of_none_twice(name):
    embeddings, _, _ = batch(dtype=np.float32)
    for labels in (np.zeros(B, int), np.arange(B)):
        loss, metrics = quickly(getattr(embedding, name), embeddings, labels)
        assert float(loss) == float(metrics["num_rows"]) == 0


def test_distances_of_close_embeddings_have_digits_left():
    """Far from the origin: a common offset of 30 costs digits of a distance by way of a product, not its gradient."""
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(40, 8)), np.arange(40) % 4

    def loss(x):
        return embedding.batch_all_triplet(x, labels, margin=1.0)[0]

    gradient = jax.jit(jax.grad(loss))
    near, far = (gradient(jnp.asarray(x + offset, jnp.float32)) for offset in (0, 30))
    assert np.linalg.norm(near - far) < 2e-3 * np.linalg.norm(near)


def test_a_distance_of_ones_own():
    own = embedding.Distance(embedding.euclidean.between, embedding.euclidean.order)
    with pytest.raises(TypeError, match=r"`distance` is euclidean.* with `all_pairs` such as euclidean"):
        embedding.batch_all_triplet(LINE, CLASSES, distance=own)
    scaled = embedding.Distance(
        lambda x, y: 2 * embedding.euclidean(x, y),
        embedding.euclidean.order,
        lambda x, y: embedding.euclidean.all_pairs(2 * x, 2 * y),
    )
    found, wanted = (quickly(embedding.batch_all_triplet, *x) for x in ((LINE, CLASSES), (2 * LINE, CLASSES)))
    assert float(quickly(embedding.batch_all_triplet, LINE, CLASSES, distance=scaled)[0]) == float(wanted[0])
    assert float(found[0]) != float(wanted[0])


# AnglE


def test_angle_by_hand():
    """Of 3 + 4i at length 1 and 1: 0.6 + 0.8. Of 1 and the same: |0.6 - 0.8|. Three components: the last is real."""
    first, second = jnp.array([[3.0, 4.0], [1.0, 0.0]]), jnp.array([[2.0, 0.0], [3.0, 4.0]])
    assert embedding.angle_similarity(first, second).tolist() == pytest.approx([1.4, 0.2])
    loss, metrics = quickly(embedding.angle, first, second, jnp.array([0, 1]), scale=2.0)
    assert float(loss) == pytest.approx(math.log1p(math.exp(2 * (1.4 - 0.2))), rel=1e-6)
    assert float(metrics["num_pairs"]) == 1
    odd = embedding.angle_similarity(jnp.array([0.0, 3.0, 4.0]), jnp.array([0.0, 1.0, 0.0]))
    assert float(odd) == pytest.approx(0.6)
    odd = embedding.angle_similarity(jnp.array([0.0, 3.0, 4.0]), jnp.array([1.0, 0.0, 0.0]))
    assert float(odd) == pytest.approx(0.8)  # 4 is the imaginary part of the first


# A teacher's scores


def test_margin_mse_takes_scores_and_margins():
    anchors, positives, negatives = batch(dtype=np.float32)
    margins = SCORES[:, :1] - SCORES[:, 1:]
    of_scores, of_margins = (embedding.margin_mse(anchors, positives, negatives, x) for x in (SCORES, margins))
    assert float(of_scores[0]) == pytest.approx(float(of_margins[0]), rel=1e-5)
    assert float(of_scores[1]["teacher_margin"]) == pytest.approx(margins.mean(), rel=1e-5)
    one = [
        embedding.margin_mse(anchors, positives, negatives[:, 0], x)[0]
        for x in (SCORES[:, :2], margins[:, 0], margins[:, :1])
    ]
    assert [float(x) for x in one[1:]] == pytest.approx([float(one[0])] * 2, rel=1e-5)


def test_score_distillation_is_a_distillation_over_documents():
    """Of any divergence; its teacher's scores in another scale are another temperature of the teacher alone."""
    anchors, positives, negatives = batch(dtype=np.float32)
    documents = np.concatenate([positives[:, None], negatives], axis=1)
    student = jaxkd.Logits(np.einsum("bd,bkd->bk", anchors, documents))
    divergence = jaxkd.jensen_shannon(0.3)
    loss, metrics = embedding.score_distillation(
        anchors, positives, negatives, 3 * SCORES.astype(np.float32), divergence=divergence, temperature=2.0
    )
    teacher = jaxkd.Logits(1.5 * SCORES.astype(np.float32))
    exact, _ = jaxkd.distillation_loss(
        jaxkd.Logits(student.values / 2), teacher, divergence=divergence, chunk_size=B, implementation="xla"
    )
    assert float(loss) == pytest.approx(float(exact), rel=1e-5)
    assert float(metrics["accuracy"]) == pytest.approx(np.mean(student.values.argmax(1) == SCORES.argmax(1)))


@pytest.mark.parametrize("name", ["margin_mse", "score_distillation"])
def test_no_gradient_reaches_a_teachers_scores(name):
    arrays = batch(dtype=np.float32)
    gradient = jax.grad(lambda scores: getattr(embedding, name)(*arrays, scores)[0])(SCORES.astype(np.float32))
    assert not np.asarray(gradient).any()


def test_matryoshka_cuts_neither_scores_nor_a_guide():
    anchors, positives, negatives = (jnp.asarray(x) for x in batch(dtype=np.float32))
    scores = jnp.asarray(SCORES, jnp.float32)
    cut = embedding.matryoshka(embedding.margin_mse, (2,), normalize=False)(
        anchors, positives, negatives, teacher_scores=scores
    )
    exact = embedding.margin_mse(anchors[:, :2], positives[:, :2], negatives[..., :2], scores)
    assert float(cut[0]) == pytest.approx(float(exact[0]), rel=1e-6)
    guide = embedding.Guide(positives, anchors)
    cut = embedding.matryoshka(embedding.info_nce, (2,))(anchors, positives, guide=guide)
    exact = embedding.info_nce(anchors[:, :2], positives[:, :2], guide=guide)
    assert float(cut[0]) == pytest.approx(float(exact[0]), rel=1e-5)


ROWS = np.ones((2, 3), np.float32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (partial(embedding.nt_xent, ROWS, np.ones(2)), ValueError, "`labels` is float32 .*one integer a row"),
        (partial(embedding.nt_xent, ROWS, np.ones(2, int), temperature=0), ValueError, "`temperature` is 0"),
        (partial(embedding.angle, ROWS, ROWS, np.ones(3)), ValueError, r"`labels` has shape \(3,\) but `first`"),
        (partial(embedding.batch_all_triplet, ROWS, np.ones(2, int), margin=None), TypeError, "`margin` is None; give"),
        (partial(embedding.batch_semi_hard_triplet, ROWS, np.ones(3, int)), ValueError, "`labels` is int32"),
        (partial(embedding.batch_semi_hard_triplet, ROWS, np.ones(2, int), chunk_size=0), ValueError, "`chunk_size`"),
        (
            partial(embedding.margin_mse, ROWS, ROWS, ROWS, np.ones((2, 3))),
            ValueError,
            r"`teacher_scores` has shape \(2, 3\); give \(2, 2\) or \(2, 1\) or \(2,\)",
        ),
        (
            partial(embedding.score_distillation, ROWS, ROWS, ROWS, np.ones((2, 1))),
            ValueError,
            r"`teacher_scores` has shape \(2, 1\); give \(2, 2\)",
        ),
        (
            partial(embedding.margin_mse, ROWS, ROWS, ROWS, np.ones((2, 2), int)),
            TypeError,
            "`teacher_scores` is int64; give a floating-point array",
        ),
        (
            partial(embedding.margin_mse, ROWS, ROWS, ROWS, np.ones((2, 2)), similarity="dot"),
            TypeError,
            "`similarity` is 'dot'; give jaxkd.embedding.dot",
        ),
        (
            partial(embedding.score_distillation, ROWS, ROWS, ROWS, np.ones((2, 2)), temperature=0.0),
            ValueError,
            "`temperature` is 0",
        ),
        (
            partial(embedding.score_distillation, ROWS, ROWS, ROWS, np.ones((2, 2)), divergence="kl"),
            TypeError,
            "`divergence` is",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
