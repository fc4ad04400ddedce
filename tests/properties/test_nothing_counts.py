"""Losses of rows where nothing counts, or where what does not count holds NaN: every loss, eager and jitted.

The tables of preference and embedding losses are `test_nothing_preferred.py` and `test_nothing_compared.py`.
"""

from functools import cache, partial

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkd

N, D, D_TEACHER, V, K = 6, 8, 12, 19, 4
TRAINED = ("hidden", "weight")


def arrays(rows=N):
    rng = np.random.default_rng(0)
    student = cases.head(0, rows, D, V).astype(jnp.float32)
    teacher = cases.head(1, rows, D_TEACHER, V).astype(jnp.float32)
    return {
        "hidden": student.hidden,
        "weight": student.weight,
        "teacher_hidden": teacher.hidden,
        "teacher_weight": teacher.weight,
        "top": jnp.asarray(np.log(np.full((rows, K), 0.2)), jnp.float32),
        "ids": jnp.asarray(np.argsort(rng.random((rows, V)), axis=1)[:, :K], jnp.int32),
        "labels": jnp.asarray(rng.integers(0, V, rows), jnp.int32),
        "weights": jnp.ones(rows),
    }


def student_of(x):
    return jaxkd.LinearLogits(x["hidden"], x["weight"])


def teacher_of(x):
    return jaxkd.LinearLogits(x["teacher_hidden"], x["teacher_weight"])


def distillation(x, teacher=teacher_of, **options):
    options = {"weights": x["weights"], "hard_weight": 0.5, "chunk_size": 2} | options
    return jaxkd.distillation_loss(student_of(x), teacher(x), x["labels"], **options)


def masked(x, **options):
    return distillation(x, mask=x["labels"] != -100, **options)


def top_k(x):
    return jaxkd.TopKLogProbs(x["top"], x["ids"])


def mixed(x):
    return jaxkd.Mixture([teacher_of(x), teacher_of(x)])


def mixed_top_k(x):
    return jaxkd.Mixture([top_k(x), jaxkd.TopKLogProbs(x["top"], x["ids"][:, ::-1])])


def routed(x):
    index = jnp.where(x["labels"] == -100, -1, x["labels"] % 2)
    return jaxkd.Routed([teacher_of(x), teacher_of(x)], index)


def shared(x):
    return jaxkd.VocabularyMap(teacher_of(x), jnp.arange(5), jnp.arange(5))


def log_probs(x, normalizer=None):
    values = jaxkd.token_log_probs(student_of(x), x["labels"], chunk_size=2)
    average = jaxkd.sequence_log_probs(student_of(x), x["labels"], average=True)
    return jnp.sum(x["weights"] * values), {"sequence": average}


def of_rows(function, x, normalizer=None):
    return jnp.sum(x["weights"] * function(x)), {}


def entropies(x):
    return jaxkd.token_entropies(student_of(x), mask=x["labels"] != -100, chunk_size=2)


def divergences(x):
    options = {"divergence": jaxkd.jensen_shannon(), "mask": x["labels"] != 0, "chunk_size": 2}
    return jaxkd.token_divergences(student_of(x), teacher_of(x), x["labels"], **options)


def own_rows(x):
    return jaxkd.chunked_rows(
        lambda *arguments: squares(*arguments)[0], student_of(x), x["labels"], per_row=teacher_of(x), chunk_size=2
    )


def cross_entropy(x, **options):
    options |= {"label_smoothing": 0.1, "z_loss": 0.1, "weights": x["weights"], "chunk_size": 2}
    return jaxkd.cross_entropy(student_of(x), x["labels"], **options)


def statistics(x, normalizer=None):
    values = jaxkd.token_statistics(student_of(x), x["labels"], teacher_of(x), chunk_size=2)
    return jnp.sum(values["soft"]), {name: jnp.sum(v) for name, v in values.items() if name != "top"}


def squares(logits, labels, per_row, shared):
    value = jnp.mean((logits - per_row) ** 2, axis=1)
    return value, {"twice": 2 * value}


def own(x, **options):
    options |= {"weights": x["weights"], "chunk_size": 2}
    return jaxkd.chunked_loss(squares, student_of(x), x["labels"], per_row=teacher_of(x), **options)


def hidden(loss, x, **options):
    options |= {"weights": x["weights"], "chunk_size": 2}
    return loss(x["hidden"], x["teacher_hidden"], x["labels"], projection=jnp.ones((D_TEACHER, D)), **options)


LOSSES = {
    "forward_kl": distillation,
    "jensen_shannon": partial(distillation, divergence=jaxkd.jensen_shannon()),
    "mask": masked,
    "cosine_distance": partial(distillation, divergence=jaxkd.cosine_distance),
    "earth_mover": partial(distillation, divergence=jaxkd.earth_mover),
    "top_k": partial(distillation, teacher=top_k),
    "mixture": partial(distillation, teacher=mixed),
    "mixture_of_top_k": partial(distillation, teacher=mixed_top_k),
    "routed": partial(distillation, teacher=routed),
    "vocabulary_map": partial(distillation, teacher=shared),
    "cross_entropy": cross_entropy,
    "log_probs": log_probs,
    "entropies": partial(of_rows, entropies),
    "divergences": partial(of_rows, divergences),
    "chunked_rows": partial(of_rows, own_rows),
    "statistics": statistics,
    "chunked_loss": own,
    "hidden_cosine": partial(hidden, jaxkd.hidden_cosine),
    "hidden_mse": partial(hidden, jaxkd.hidden_mse),
}
OF_ROWS = ("log_probs", "entropies", "divergences", "chunked_rows", "statistics")  # no weight masks their numbers
NOTHING = {
    "no rows": lambda: (arrays(0), {}),
    "no label counts": lambda: (arrays() | {"labels": jnp.full(N, -100, jnp.int32)}, {}),
    "all weights 0": lambda: (arrays() | {"weights": jnp.zeros(N)}, {}),
    "empty micro-batch": lambda: (arrays() | {"labels": jnp.full(N, -100, jnp.int32)}, {"normalizer": 0.0}),
}


def value_and_gradients(loss, x, **options):
    def of(trained):
        return loss(x | trained, **options)

    return jax.value_and_grad(of, has_aux=True)({name: x[name] for name in TRAINED})


@cache
def compiled(name):
    return jax.jit(partial(value_and_gradients, LOSSES[name]))


# Eagerly a normalizer of 0 is a number that is known, and so is that there is no row; of values nothing is known.
FEW = ("forward_kl", "top_k", "cross_entropy", "log_probs", "chunked_loss", "hidden_mse")


def ways():
    for name in LOSSES:
        yield from ((name, situation, True) for situation in NOTHING)
        for situation in NOTHING:
            is_fast = situation == "no rows" or (situation == "empty micro-batch" and name in FEW)
            yield pytest.param(name, situation, False, marks=() if is_fast else pytest.mark.slow)


@pytest.mark.parametrize(("name", "situation", "jitted"), list(ways()))
def test_nothing_counts(name, situation, jitted):
    """Loss, metrics and gradients are 0, never NaN, even where all that there is is NaN."""
    x, options = NOTHING[situation]()
    if name in OF_ROWS:
        if situation == "all weights 0":
            return
        options = {}
    x |= {key: jnp.full_like(x[key], jnp.nan) for key in ("hidden", "teacher_hidden", "top")}
    function = compiled(name) if jitted else partial(value_and_gradients, LOSSES[name])
    (loss, metrics), gradients = function(x, **options)
    assert loss == 0
    assert all(jnp.all(v == 0) for key, v in metrics.items() if key != "num_rows")
    assert all(jnp.all(g == 0) for g in gradients.values())
    expected = N if situation == "all weights 0" else 0
    assert metrics.get("num_rows", expected) == expected


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("name", LOSSES)
def test_dead_rows_add_nothing(name, bad):
    """The same numbers, bit for bit, as with finite rows in their place."""
    x = arrays()
    dead = jnp.arange(N) % 3 == 1
    x["labels"] = jnp.where(dead, -100, x["labels"])

    def with_rows(value):
        return {k: jnp.where(dead[:, None], value, x[k]) for k in ("hidden", "teacher_hidden", "top")}

    clean, dirty = (compiled(name)(x | with_rows(value)) for value in (0.0, bad))
    for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty), strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.isfinite(a).all()
