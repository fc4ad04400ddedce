"""Bad input: one clear error each, that names the argument, says what came and what to do, before any work."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkd

N, D, D_TEACHER, V = 6, 4, 3, 11
GOOD = {
    "student_hidden": jnp.ones((N, D)),
    "student_weight": jnp.ones((V, D)),
    "teacher_hidden": jnp.ones((N, D_TEACHER)),
    "teacher_weight": jnp.ones((V, D_TEACHER)),
    "labels": jnp.zeros(N, jnp.int32),
}

# What is changed, the error, and what its message has to hold.
BAD = {
    "hidden_size": ({"student_hidden": jnp.ones((N, 5))}, ValueError, ["`student_weight`", "D=4", "D=5"]),
    "teacher_hidden_size": ({"teacher_hidden": jnp.ones((N, 5))}, ValueError, ["`teacher_weight`", "D=3", "D=5"]),
    "transposed_weight": ({"student_weight": jnp.ones((D, V))}, ValueError, ["`student_weight`", "student_weight.T"]),
    "rank_of_weight": ({"student_weight": jnp.ones((1, V, D))}, ValueError, ["`student_weight`", r"\(1, 11, 4\)"]),
    "rank_of_teacher_weight": ({"teacher_weight": jnp.ones(V)}, ValueError, ["`teacher_weight`", r"\(11,\)"]),
    "rank_of_hidden": ({"student_hidden": jnp.ones(())}, ValueError, ["`student_hidden`"]),
    "leading_sizes": (
        {"teacher_hidden": jnp.ones((7, D_TEACHER))},
        ValueError,
        ["`teacher_hidden`", r"\(7,\)", r"\(6,\)"],
    ),
    "leading_axes": (
        {"teacher_hidden": jnp.ones((2, 3, D_TEACHER))},
        ValueError,
        ["`teacher_hidden`", r"\(2, 3\)", r"\(6,\)"],
    ),
    "labels_shape": ({"labels": jnp.zeros(N + 1, jnp.int32)}, ValueError, ["`labels`", r"\(7,\)", r"\(6,\)"]),
    "labels_rank": ({"labels": jnp.zeros((N, 1), jnp.int32)}, ValueError, ["`labels`", r"\(6, 1\)"]),
    "float_labels": ({"labels": jnp.zeros(N)}, TypeError, ["`labels`", "float32", "integer"]),
    "boolean_labels": ({"labels": jnp.zeros(N, bool)}, TypeError, ["`labels`", "bool", "integer"]),
    "integer_hidden": ({"student_hidden": jnp.ones((N, D), jnp.int32)}, TypeError, ["`student_hidden`", "int32"]),
    "integer_teacher": ({"teacher_hidden": jnp.ones((N, D_TEACHER), int)}, TypeError, ["`teacher_hidden`", "int"]),
    "integer_weight": ({"student_weight": jnp.ones((V, D), jnp.int8)}, TypeError, ["`student_weight`", "int8"]),
    "list_as_hidden": ({"student_hidden": [[1.0] * D] * N}, TypeError, ["`student_hidden`", "list"]),
    "bias_shape": ({"student_bias": jnp.ones(V + 1)}, ValueError, ["`student_bias`", r"\(12,\)", "V=11"]),
    "teacher_bias_shape": ({"teacher_bias": jnp.ones((V, 1))}, ValueError, ["`teacher_bias`", r"\(11, 1\)"]),
    "integer_bias": ({"student_bias": jnp.ones(V, jnp.int32)}, TypeError, ["`student_bias`", "int32"]),
    "weights_shape": ({"weights": jnp.ones(N - 1)}, ValueError, ["`weights`", r"\(5,\)", r"\(6,\)"]),
    "negative_weights": ({"weights": np.array([1.0, 1, 1, 1, 1, -0.5])}, ValueError, ["`weights`", "-0.5"]),
    "no_vocabulary": ({"teacher_weight": jnp.ones((0, D_TEACHER))}, ValueError, ["`teacher_weight`", "V=0"]),
    "beta_above": ({"beta": 1.5}, ValueError, ["`beta`", "1.5", r"\[0, 1\]"]),
    "beta_below": ({"beta": -0.1}, ValueError, ["`beta`", "-0.1"]),
    "beta_nan": ({"beta": float("nan")}, ValueError, ["`beta`", "nan"]),
    "beta_array": ({"beta": jnp.asarray(2.0)}, ValueError, ["`beta`", "2"]),
    "temperature_zero": ({"temperature": 0.0}, ValueError, ["`temperature`", "0"]),
    "temperature_negative": ({"temperature": -2}, ValueError, ["`temperature`", "-2"]),
    "temperature_nan": ({"temperature": float("nan")}, ValueError, ["`temperature`", "nan"]),
    "temperature_array": ({"temperature": jnp.asarray([1.0, 2.0])}, (TypeError, ValueError), ["`temperature`"]),
    "temperature_text": ({"temperature": "hot"}, TypeError, ["`temperature`", "hot"]),
    "soft_weight": ({"soft_weight": -1.0}, ValueError, ["`soft_weight`", "-1"]),
    "hard_weight": ({"hard_weight": -1.0}, ValueError, ["`hard_weight`", "-1"]),
    "hard_weight_without_labels": (
        {"labels": None, "hard_weight": 0.5},
        ValueError,
        ["`hard_weight`", "0.5", "`labels`"],
    ),
    "integer_mask": ({"mask": jnp.ones(N, jnp.int32)}, TypeError, ["`mask`", "int32", "booleans"]),
    "mask_shape": ({"mask": jnp.ones((N, 1), bool)}, ValueError, ["`mask`", r"\(6, 1\)", r"\(6,\)"]),
    "normalizer_negative": ({"normalizer": -4.0}, ValueError, ["`normalizer`", "-4"]),
    "chunk_size_zero": ({"chunk_size": 0}, ValueError, ["`chunk_size`", "0"]),
    "chunk_size_negative": ({"chunk_size": -8}, ValueError, ["`chunk_size`", "-8"]),
    "chunk_size_float": ({"chunk_size": 8.0}, TypeError, ["`chunk_size`", "8.0"]),
    "chunk_size_flag": ({"chunk_size": True}, TypeError, ["`chunk_size`", "True"]),
    "implementation": ({"implementation": "cuda"}, ValueError, ["`implementation`", "cuda", "xla", "triton"]),
    "widths": (
        {"teacher_weight": jnp.ones((V + 2, D_TEACHER))},
        ValueError,
        ["V=11", "V=13", "`vocabulary`", "truncate", "mask", "VocabularyMap"],
    ),
    "vocabulary": ({"vocabulary": "pad"}, ValueError, ["`vocabulary`", "pad", "truncate", "mask"]),
    "ignore_index": ({"ignore_index": 1.5}, TypeError, ["`ignore_index`", "1.5"]),
}


def expect(error, fragments):
    return pytest.raises(error, match="(?s)" + "".join(f"(?=.*{fragment})" for fragment in fragments))


@pytest.mark.parametrize("case", BAD)
def test_fused_linear_jsd(case):
    changes, error, fragments = BAD[case]
    with expect(error, fragments):
        jaxkd.fused_linear_jsd(**GOOD | changes)


@pytest.mark.parametrize("case", BAD)
def test_at_tracing(case):
    """The same under jit, with the arrays traced: nothing is computed, nothing is compiled."""
    changes, error, fragments = BAD[case]
    arguments = GOOD | changes
    arrays = {name: x for name, x in arguments.items() if isinstance(x, jax.Array) and x.ndim}
    rest = {name: x for name, x in arguments.items() if name not in arrays}
    with expect(error, fragments):
        jax.jit(lambda arrays: jaxkd.fused_linear_jsd(**arrays, **rest)).trace(arrays)


STUDENT = jaxkd.LinearLogits(GOOD["student_hidden"], GOOD["student_weight"])
TEACHER = jaxkd.LinearLogits(GOOD["teacher_hidden"], GOOD["teacher_weight"])
BAD_SOURCES = {
    "array_as_student": (
        (STUDENT.hidden, TEACHER),
        {},
        TypeError,
        ["`student` is an array;", "LinearLogits", "fused_linear_jsd"],
    ),
    "array_as_teacher": ((STUDENT, TEACHER.hidden), {}, TypeError, ["`teacher`", "LinearLogits"]),
    "none_as_teacher": ((STUDENT, None), {}, TypeError, ["`teacher`", "NoneType"]),
    "integer_logits": ((STUDENT, jaxkd.Logits(jnp.ones((N, V), int))), {}, TypeError, [r"`teacher\.values`", "int"]),
    "scalar_logits": ((jaxkd.Logits(jnp.ones(())), TEACHER), {}, ValueError, [r"`student\.values`"]),
    "empty_logits": ((jaxkd.Logits(jnp.ones((N, 0))), TEACHER), {}, ValueError, [r"`student\.values`", "V=0"]),
    "rows_of_logits": ((STUDENT, jaxkd.Logits(jnp.ones((7, V)))), {}, ValueError, [r"`teacher\.values`", r"\(7,\)"]),
    "hidden_size": (
        (jaxkd.LinearLogits(jnp.ones((N, 5)), STUDENT.weight), TEACHER),
        {},
        ValueError,
        [r"`student\.weight`", "D=4", "D=5"],
    ),
    "softcap": (
        (jaxkd.LinearLogits(STUDENT.hidden, STUDENT.weight, softcap=0.0), TEACHER),
        {},
        ValueError,
        [r"`student\.softcap`", "0"],
    ),
    "scale_shape": (
        (jaxkd.LinearLogits(STUDENT.hidden, STUDENT.weight, scale=jnp.ones(V)), TEACHER),
        {},
        (TypeError, ValueError),
        [r"`student\.scale`"],
    ),
    "widths_of_a_mixture": (
        (STUDENT, jaxkd.Mixture([jaxkd.Logits(jnp.ones((N, V - 4)))])),
        {},
        ValueError,
        ["V=11", "V=7", "`vocabulary`", "truncate", "mask", "VocabularyMap"],
    ),
    "widths_of_a_divergence_of_rows": (
        (STUDENT, jaxkd.Logits(jnp.ones((N, V + 1)))),
        {"divergence": jaxkd.mse},
        ValueError,
        ["V=11", "V=12", "`vocabulary`"],
    ),
    "divergence_family": (
        (STUDENT, TEACHER),
        {"divergence": jaxkd.jensen_shannon},
        TypeError,
        ["`divergence`", "call it", r"jaxkd\.jensen_shannon\(beta=0\.5\)"],
    ),
    "divergence_none": ((STUDENT, TEACHER), {"divergence": None}, TypeError, ["`divergence`", "None", "jaxkd"]),
    "term": (
        (STUDENT, TEACHER),
        {"divergence": lambda log_p, log_q: log_p},
        TypeError,
        ["`divergence`", "lambda", r"jaxkd\.Divergence\("],
    ),
    "class_as_teacher": ((STUDENT, jaxkd.TopKLogProbs), {}, TypeError, ["`teacher`"]),
    "list_as_labels": ((STUDENT, TEACHER, [0] * N), {}, TypeError, ["`labels`", "list", "give an array"]),
    "list_as_mask": ((STUDENT, TEACHER), {"mask": [True] * N}, TypeError, ["`mask`", "list", "give an array"]),
    "hard_weight_without_labels": (
        (STUDENT, TEACHER),
        {"hard_weight": jnp.asarray(0.5)},
        ValueError,
        ["`hard_weight`", "0.5", "`labels`"],
    ),
    "vocabulary": ((STUDENT, TEACHER), {"vocabulary": "pad"}, ValueError, ["`vocabulary`", "pad", "truncate", "mask"]),
}


@pytest.mark.parametrize("case", BAD_SOURCES)
def test_distillation_loss(case):
    sources, options, error, fragments = BAD_SOURCES[case]
    with expect(error, fragments):
        jaxkd.distillation_loss(*sources, **options)


# What one might write, and what was meant.
NAMES = {
    "forward_kl": {"forward_kl"},
    "Reverse-KL": {"reverse_kl"},
    "kl": {"forward_kl", "reverse_kl", "skew_kl(alpha=0.1)", "symmetric_kl(weight=0.5)"},
    "kld": {"forward_kl", "reverse_kl", "skew_kl(alpha=0.1)", "symmetric_kl(weight=0.5)"},
    "jsd": {"jensen_shannon(beta=0.5)"},
    "jenson_shanon": {"jensen_shannon(beta=0.5)"},
    "tv": {"total_variation"},
}


@pytest.mark.parametrize("name", NAMES)
def test_a_divergence_by_name_is_answered_with_the_object(name):
    with expect(TypeError, ["`divergence`", re.escape(repr(name))]) as error:
        jaxkd.distillation_loss(STUDENT, TEACHER, divergence=name)
    assert set(re.findall(r"jaxkd\.([\w(=.]+\w\)?)", str(error.value))) == NAMES[name]


def test_any_other_name_is_answered_with_all_of_them():
    with expect(TypeError, [r"jaxkd\.hellinger", r"jaxkd\.earth_mover", r"jaxkd\.sinkhorn\(embeddings, "]):
        jaxkd.distillation_loss(STUDENT, TEACHER, divergence="?")


@pytest.mark.parametrize(("name", "arguments"), [("forward_kl", ()), ("mse", ()), ("reverse_kl", (jnp.ones(()),))])
def test_a_divergence_is_no_function_that_makes_one(name, arguments):
    with expect(TypeError, [rf"jaxkd\.{name} is a divergence and not a function", "without brackets"]):
        getattr(jaxkd, name)(*arguments)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_traced_temperature_that_is_none_is_no_number(temperature):
    """It cannot be refused; at -1 the loss would be one of reversed logits."""
    loss, gradient = _of_hidden(STUDENT.hidden, temperature)
    assert np.isnan(loss)
    assert np.isnan(gradient).all()


@jax.jit
@jax.value_and_grad
def _of_hidden(hidden, temperature):
    return jaxkd.distillation_loss(jaxkd.LinearLogits(hidden, STUDENT.weight), TEACHER, temperature=temperature)[0]


OUTSIDE = [
    (jaxkd.jensen_shannon, "beta", -0.1),
    (jaxkd.jensen_shannon, "beta", 1.1),
    (jaxkd.symmetric_kl, "weight", -0.1),
    (jaxkd.symmetric_kl, "weight", 1.1),
    (jaxkd.skew_kl, "alpha", -0.1),
    (jaxkd.skew_kl, "alpha", 1.0),
    (jaxkd.alpha_divergence, "alpha", float("nan")),
    (jaxkd.alpha_divergence, "alpha", float("inf")),
]


@pytest.mark.parametrize(("family", "name", "value"), OUTSIDE)
def test_parameters_of_divergences(family, name, value):
    with expect(ValueError, [f"`{name}`", re.escape(f"{value:g}")]):
        family(value)


@pytest.mark.parametrize("family", [jaxkd.jensen_shannon, jaxkd.symmetric_kl, jaxkd.skew_kl, jaxkd.alpha_divergence])
def test_parameters_are_numbers(family):
    with pytest.raises(TypeError, match=r"`\w+` is 'half'; give a number"):
        family("half")


def test_triton_without_a_gpu_says_why():
    if jax.default_backend() == "gpu":
        pytest.skip("there is a GPU")
    with expect(ValueError, ["implementation", "triton", "GPU", "cpu", "xla"]):
        jaxkd.fused_linear_jsd(**GOOD, implementation="triton")


@pytest.mark.parametrize(
    "call",
    [
        lambda **x: jaxkd.cross_entropy(STUDENT, GOOD["labels"], **x),
        lambda **x: jaxkd.token_log_probs(STUDENT, GOOD["labels"], **x),
        lambda **x: jaxkd.sequence_log_probs(STUDENT, GOOD["labels"], **x),
        lambda **x: jaxkd.token_entropies(STUDENT, **x),
        lambda **x: jaxkd.token_divergences(STUDENT, TEACHER, **x),
        lambda **x: jaxkd.token_statistics(STUDENT, None, TEACHER, **x),
    ],
)
@pytest.mark.parametrize("name", ["triton", "mosaic"])
def test_a_kernel_without_a_gpu_says_why(name, call):
    if jax.default_backend() == "gpu":
        pytest.skip("there is a GPU")
    with expect(ValueError, ["implementation", name, "xla"]):
        call(implementation=name)
    with expect(ValueError, ["`implementation`", "cuda", "triton"]):
        call(implementation="cuda")


def test_positional_options_are_refused():
    with pytest.raises(TypeError, match="positional"):
        jaxkd.fused_linear_jsd(*GOOD.values(), 0.5)


def test_good_input_is_good():
    loss, _ = jaxkd.fused_linear_jsd(**GOOD)
    assert np.isfinite(loss)
