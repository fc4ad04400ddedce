"""Which candidates `info_nce` compares a row with, in numbers worked by hand."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick_programs import at_once

from jaxkd.embedding import Guide, info_nce

ANCHORS = jnp.array([[1.0, 0.0], [0.0, 2.0]])
POSITIVES = jnp.array([[0.8, 0.6], [0.6, 0.8]])  # cosines 0.8, 0.6 of the first anchor and 0.6, 0.8 of the second
NEGATIVES = jnp.array([[[0.0, 1.0], [-1.0, 0.0]], [[3.0, 0.0], [0.0, -1.0]]])  # 0, -1, 1, 0 and 1, 0, 0, -1


def losses(**settings):
    """The sums of each row's exponentials, found back from its loss."""
    first, second = ({"weights": jnp.array(x)} for x in ((1.0, 1e-30), (1e-30, 1.0)))  # the other row is there
    calls = {
        f"{name} {i}": partial(info_nce, ANCHORS, POSITIVES, scale=1.0, normalizer=1.0, **row, **options)
        for name, options in settings.items()
        for i, row in enumerate((first, second))
    }
    results = at_once(calls)
    return {name: [float(results[f"{name} {i}"][0]) + 0.8 for i in range(2)] for name in settings}


def log_sum(*cosines):
    return pytest.approx(math.log(sum(map(math.exp, cosines))), rel=1e-6)


def test_negatives_that_are_there():
    found = losses(
        all={"negatives": NEGATIVES},
        some={"negatives": NEGATIVES, "negative_mask": jnp.array([[True, False], [True, True]])},
        none={"negatives": NEGATIVES, "negative_mask": jnp.zeros((2, 2), bool)},
        one={"negatives": NEGATIVES[:, 0], "negative_mask": jnp.array([True, False])},
    )
    assert found["all"] == [log_sum(0.8, 0.6, 0, -1, 1, 0), log_sum(0.6, 0.8, 1, 0, 0, -1)]
    assert found["some"] == [log_sum(0.8, 0.6, 0, 1, 0), log_sum(0.6, 0.8, 1, 0, -1)]
    assert found["none"] == [log_sum(0.8, 0.6)] * 2
    assert found["one"] == [log_sum(0.8, 0.6, 0), log_sum(0.6, 0.8, 1)]


def test_a_mask_and_ids():
    """Columns: both positives, then the negatives row by row. The own positive stays."""
    mask = jnp.array([[False, True, False, True, False, True], [True, True, True, True, True, True]])
    found = losses(
        mask={"negatives": NEGATIVES, "candidate_mask": mask},
        nothing={"candidate_mask": jnp.zeros((2, 2), bool)},
        copies={"document_ids": jnp.array([7, 7])},
        different={"document_ids": jnp.array([7, 8])},
        among_negatives={"negatives": NEGATIVES, "document_ids": jnp.array([[7, 1, 2], [8, 7, 8]])},
        with_anchors={"document_ids": jnp.array([7, 7]), "directions": ("query_to_doc", "query_to_query")},
    )
    assert found["mask"] == [log_sum(0.8, 0.6, -1, 0), log_sum(0.6, 0.8, 1, 0, 0, -1)]
    assert found["nothing"] == found["copies"] == [log_sum(0.8)] * 2
    assert found["different"] == [log_sum(0.8, 0.6)] * 2
    assert found["among_negatives"] == [log_sum(0.8, 0.6, 0, -1, 0), log_sum(0.6, 0.8, 1, 0, 0)]
    assert found["with_anchors"] == [log_sum(0.8)] * 2  # an anchor of the same document is none to be told apart


def test_directions():
    """The anchors' cosine is 0, that of the positives 0.96; a row's own negatives are none of its positive's."""
    every = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
    found = losses(
        anchors={"directions": every[:2]},
        backward={"directions": every[::2]},
        documents={"directions": every[::3]},
        all={"directions": every, "negatives": NEGATIVES},
    )
    assert found["anchors"] == [log_sum(0.8, 0.6, 0)] * 2
    assert found["backward"] == [log_sum(0.8, 0.6, 0.8, 0.6)] * 2
    assert found["documents"] == [log_sum(0.8, 0.6, 0.96)] * 2
    first = [0.8, 0.6, 0, -1, 1, 0, 0, 0.8, 0.6, 0.96, 0.8, -0.6]
    second = [0.6, 0.8, 1, 0, 0, -1, 0, 0.6, 0.8, 0.96, 0.8, -0.6]
    assert found["all"] == [log_sum(*first), log_sum(*second)]


def test_a_guide():
    """It finds the second positive at cosine 1 of both anchors, and the first at 0.6 of its own: that one is left out
    for the first anchor; of the second, the guide's 0.6 is near enough with a margin of 0.5 alone."""
    guide = partial(Guide, jnp.array([[1.0, 0.0], [1.0, 0.0]]), jnp.array([[3.0, 4.0], [1.0, 0.0]]))
    found = losses(
        plain={"guide": guide()},
        margin={"guide": guide(margin=0.5)},
        relative={"guide": guide(relative_margin=0.5)},
        negative={"guide": guide(margin=-0.5)},
    )
    assert found["plain"] == [log_sum(0.8), log_sum(0.6, 0.8)]
    assert found["margin"] == found["relative"] == [log_sum(0.8)] * 2
    assert found["negative"] == [log_sum(0.8, 0.6)] * 2


def test_what_is_as_near_as_the_positive_stays():
    """Copies of a positive are exactly as near to a guide, in whatever column they are."""
    rng = np.random.default_rng(0)
    anchors, positives = rng.normal(size=(2, 33, 5)).astype(np.float32)
    positives[1:] = positives[0]
    guide = Guide(anchors, positives)
    for directions in (("query_to_doc",), ("query_to_doc", "doc_to_query")):
        of = partial(info_nce, anchors, positives, directions=directions[:1])
        results = [x for x, _ in at_once({"without": of, "with": partial(of, guide=guide)}).values()]
        assert float(results[0]) == pytest.approx(float(results[1]), rel=1e-6)
        assert float(results[0]) == pytest.approx(math.log(33), rel=1e-5)


def test_no_gradient_reaches_a_guide():
    def loss(x):
        return info_nce(ANCHORS, POSITIVES, guide=Guide(x, x))[0]

    assert not np.asarray(jax.jit(jax.grad(loss))(ANCHORS)).any()


def test_a_temperature_is_the_inverse_of_a_scale():
    results = at_once({name: partial(info_nce, ANCHORS, POSITIVES, **{name: 0.5}) for name in ("scale", "temperature")})
    wanted = at_once({name: partial(info_nce, ANCHORS, POSITIVES, scale=x) for name, x in (("a", 0.5), ("b", 2.0))})
    assert [float(x[0]) for x in results.values()] == [float(x[0]) for x in wanted.values()]


def test_accuracy_does_not_see_the_pair_twice():
    """Among directions, a row's own pair comes a second time, from its positive's side."""
    rng = np.random.default_rng(0)
    anchors = rng.normal(size=(40, 6)).astype(np.float32)
    positives = anchors + 0.1 * rng.normal(size=(40, 6)).astype(np.float32)
    _, metrics = jax.jit(partial(info_nce, directions=("query_to_doc", "doc_to_query")))(anchors, positives)
    assert float(metrics["accuracy"]) == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scale": 1.0, "temperature": 1.0}, ValueError, "`scale` and `temperature` are both given"),
        ({"temperature": 0.0}, ValueError, "`temperature` is 0; give a number above 0"),
        ({"directions": ("doc_to_doc",)}, ValueError, '`directions` is .* give "query_to_doc" and'),
        ({"directions": "query_to_doc"}, ValueError, "`directions` is 'query_to_doc'; give"),
        ({"directions": ("query_to_doc", "back")}, ValueError, "`directions` is .* give"),
        (
            {"directions": ("query_to_doc", "doc_to_doc"), "symmetric": True},
            ValueError,
            "`symmetric` is the mean of two",
        ),
        ({"negative_mask": np.ones(2, bool)}, ValueError, "`negative_mask` is given without `negatives`"),
        (
            {"negatives": NEGATIVES, "negative_mask": np.ones((2, 3), bool)},
            ValueError,
            r"`negative_mask` is bool \(2, 3\); give booleans \(2, 2\)",
        ),
        ({"candidate_mask": np.ones((2, 2))}, ValueError, "`candidate_mask` is float32 .* give booleans"),
        ({"candidate_mask": np.ones((2, 3), bool)}, ValueError, "`candidate_mask` has 3 columns; .* here 2"),
        ({"candidate_mask": np.ones((2, 6), bool), "negatives": NEGATIVES[:, 0]}, ValueError, "6 columns; .* here 4"),
        ({"document_ids": np.ones(2)}, ValueError, r"`document_ids` is float32 \(2,\); give integers \(2, 1\)"),
        ({"document_ids": np.ones(2, int), "negatives": NEGATIVES}, ValueError, r"give integers \(2, 3\)"),
        ({"guide": ANCHORS}, TypeError, "`guide` is a ArrayImpl; give a jaxkd.embedding.Guide"),
        ({"guide": Guide(ANCHORS[:1], ANCHORS[:1])}, ValueError, r"`guide.anchors` has shape \(1, 2\) but `anchors`"),
        (
            {"guide": Guide(ANCHORS, ANCHORS[:1])},
            ValueError,
            r"`guide.positives` has shape \(1, 2\) but `guide.anchors`",
        ),
        (
            {"guide": Guide(ANCHORS, ANCHORS, NEGATIVES)},
            ValueError,
            "`guide.negatives` and `negatives` belong together",
        ),
        (
            {"guide": Guide(ANCHORS, ANCHORS, NEGATIVES[:, 0]), "negatives": NEGATIVES},
            ValueError,
            "`guide.negatives` has K=1 but `negatives` K=2",
        ),
        ({"guide": Guide(ANCHORS, ANCHORS, margin="x")}, TypeError, "`guide.margin` is 'x'; give a number"),
    ],
)
def test_errors(options, error, message):
    with pytest.raises(error, match=message):
        info_nce(ANCHORS, POSITIVES, **options)
