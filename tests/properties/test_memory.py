"""Memory and work, which are the promise: no logits beyond a chunk, no product that nobody asked for."""

import re

import cases
import jax
import jax.numpy as jnp
import jaxprs
import pytest

import jaxkd

# Sizes that cannot be mistaken for one another.
N, D, D_TEACHER, V, V_TEACHER, CHUNK = 96, 40, 56, 1009, 1013, 16
LABELS = cases.some_labels(2, N, V)
JSD = jaxkd.jensen_shannon(0.5)
HEADS = {(V, D), (D, V), (V_TEACHER, D_TEACHER), (D_TEACHER, V_TEACHER)}


def inputs(rows=N, dtype=jnp.float32, **transform):
    student = cases.head(0, rows, D, V, **transform).astype(dtype)
    teacher = cases.head(1, rows, D_TEACHER, V_TEACHER, **transform).astype(dtype)
    return student, teacher


def traced(student, teacher, labels=LABELS, *, differentiate=True, **options):
    options = {
        "chunk_size": CHUNK,
        "divergence": jaxkd.jensen_shannon(0.5),
        "hard_weight": 0.5,
        "vocabulary": "truncate",
        **options,
    }
    if labels is None:
        options["hard_weight"] = 0.0

    def loss(student):
        return jaxkd.distillation_loss(student, teacher, labels, **options)

    function = jax.value_and_grad(loss, has_aux=True) if differentiate else loss
    return jax.make_jaxpr(function)(student)


@pytest.mark.parametrize("differentiate", [False, True])
@pytest.mark.parametrize("labels", [LABELS, None])
@pytest.mark.parametrize("rows", [N, N - 5])
@pytest.mark.parametrize("transform", [{}, {"bias": True, "scale": 0.5, "softcap": 30.0}])
@pytest.mark.parametrize("vocabulary", ["truncate", "mask"])
def test_no_more_than_a_chunk_of_logits(differentiate, labels, rows, transform, vocabulary):
    labels = None if labels is None else labels[:rows]
    jaxpr = traced(
        *inputs(rows, **transform), labels, differentiate=differentiate, vocabulary=vocabulary, temperature=2.0
    )
    assert jaxprs.most_rows(jaxpr, V, HEADS) == CHUNK
    assert jaxprs.most_rows(jaxpr, V_TEACHER, HEADS) == CHUNK


@pytest.mark.parametrize("name", cases.ONE_OF_EACH)
def test_no_more_than_a_chunk_of_logits_for_any_divergence(name):
    jaxpr = traced(*inputs(), divergence=cases.DIVERGENCES[name].make())
    assert jaxprs.most_rows(jaxpr, V, HEADS) == CHUNK
    assert jaxprs.most_rows(jaxpr, V_TEACHER, HEADS) == CHUNK


@pytest.mark.parametrize("chunk_size", [1, 7, 32, 95])
def test_chunk_size_is_never_exceeded(chunk_size):
    jaxpr = traced(*inputs(), chunk_size=chunk_size)
    assert jaxprs.most_rows(jaxpr, V, HEADS) <= chunk_size
    assert jaxprs.most_rows(jaxpr, V_TEACHER, HEADS) <= chunk_size


def test_the_walk_sees_dense_logits():
    """The walk itself: it finds what the dense loss holds."""
    student, teacher = inputs()
    jaxpr = jax.make_jaxpr(jax.jit(dense_loss))(student, teacher)
    assert jaxprs.most_rows(jaxpr, V, HEADS) == N


def dense_loss(student, teacher):
    log_q = jax.nn.log_softmax(student.hidden @ student.weight.T)
    log_p = jax.nn.log_softmax((teacher.hidden @ teacher.weight.T)[:, :V])
    log_m = jnp.logaddexp(log_p, log_q) - jnp.log(2)
    jsd = jnp.exp(log_p) * (log_p - log_m) + jnp.exp(log_q) * (log_q - log_m)
    return jnp.sum(jsd) / (2 * len(log_q))


@pytest.mark.parametrize("labels", [LABELS, None])
def test_a_loop_over_chunks(labels):
    loops = [x for x in jaxprs.equations(traced(*inputs(), labels)) if x.primitive.name in ("scan", "while")]
    assert loops
    products = jaxprs.products(traced(*inputs(), labels))
    inside = [product for loop in loops for jaxpr in bodies(loop) for product in jaxprs.products(jaxpr)]
    assert len(inside) == len(products)


def bodies(loop):
    return [loop.params["jaxpr"]] if loop.primitive.name == "scan" else [loop.params["body_jaxpr"]]


def test_loss_alone_is_two_products():
    """Evaluation: nobody differentiates, nobody pays."""
    jaxpr = traced(*inputs(), differentiate=False)
    assert len(jaxprs.products(jaxpr)) == 2
    assert not accumulators(jaxpr)


def test_loss_and_gradients_are_four_products():
    jaxpr = traced(*inputs())
    assert len(jaxprs.products(jaxpr)) == 4
    assert len(accumulators(jaxpr)) == 1


def accumulators(jaxpr):
    """What a loop carries of the head's shape."""
    loops = [x for x in jaxprs.equations(jaxpr) if x.primitive.name in ("scan", "while")]
    return [v for loop in loops for v in loop.outvars if v.aval.shape == (V, D)]


@pytest.mark.parametrize("argument", ["hidden", "weight"])
def test_only_what_is_asked_for(argument):
    """A frozen head has no gradient of its size; frozen hidden states save a product too."""
    student, teacher = inputs()

    def loss(x):
        arrays = {"hidden": student.hidden, "weight": student.weight} | {argument: x}
        return jaxkd.distillation_loss(
            jaxkd.LinearLogits(**arrays), teacher, LABELS, vocabulary="truncate", chunk_size=CHUNK
        )[0]

    jaxpr = jax.make_jaxpr(jax.grad(loss))(getattr(student, argument))
    assert len(jaxprs.products(jaxpr)) == 3
    assert len(accumulators(jaxpr)) == (argument == "weight")


def test_teacher_alone_costs_no_gradient_product():
    student, teacher = inputs()

    def loss(teacher):
        return jaxkd.distillation_loss(student, teacher, LABELS, vocabulary="truncate", chunk_size=CHUNK)[0]

    assert len(jaxprs.products(jax.make_jaxpr(jax.grad(loss))(teacher))) <= 2


def test_head_gradient_is_carried_in_float32():
    (accumulator,) = accumulators(traced(*inputs(dtype=jnp.bfloat16)))
    assert accumulator.aval.dtype == jnp.float32


def compiled(rows, chunk_size, function="fused", width=8192, hidden=64, divergence=JSD):
    student, teacher = (
        jaxkd.LinearLogits(*(jax.ShapeDtypeStruct((size, hidden), jnp.float32) for size in (rows, width)))
        for _ in range(2)
    )

    def fused(student, teacher):
        return jaxkd.distillation_loss(student, teacher, divergence=divergence, chunk_size=chunk_size)[0]

    def dense(student, teacher):
        log_q, log_p = (jax.nn.log_softmax(x.hidden @ x.weight.T) for x in (student, teacher))
        return jnp.sum(divergence.term(log_p, log_q, *divergence.parameters)) / rows

    return jax.jit(jax.value_and_grad({"fused": fused, "dense": dense}[function])).lower(student, teacher).compile()


def temporary_bytes(*arguments, **options):
    return compiled(*arguments, **options).memory_analysis().temp_size_in_bytes


@pytest.mark.optimized
def test_compiled_memory_is_that_of_a_chunk():
    """Twelve arrays of a chunk's logits and two of a head are generous; the dense loss needs several of all rows."""
    rows, chunk_size, width, hidden = 2048, 64, 8192, 64
    fused, dense = temporary_bytes(rows, chunk_size), temporary_bytes(rows, chunk_size, "dense")
    assert dense >= 4 * rows * width
    assert fused <= 4 * (12 * chunk_size * width + 2 * hidden * width + 8 * rows * hidden)
    assert fused < dense / 4


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("rows", "width", "hidden", "share"),
    [(512, 16384, 128, 0.5), (1024, 2048, 64, 0.25), (1024, 49152, 576, 0.25), (1500, 151936, 64, 0.25)],
)
def test_default_takes_a_quarter_of_the_dense_memory(rows, width, hidden, share):
    """Of forward KL, whose dense formula takes less than the Jensen-Shannon loss's; half with few rows."""
    sizes = {"width": width, "hidden": hidden, "divergence": jaxkd.forward_kl}
    assert temporary_bytes(rows, None, **sizes) <= share * temporary_bytes(rows, None, "dense", **sizes)


@pytest.mark.optimized
def test_compiled_memory_does_not_grow_with_the_rows():
    few, many = temporary_bytes(512, 64), temporary_bytes(4096, 64)
    assert many - few <= 4 * (4096 - 512) * (8 * 64)


@pytest.mark.optimized
def test_no_copy_of_the_head_in_the_loop():
    """A Flax kernel is (D, V): `kernel.T` must be turned no more than once, not once a chunk."""
    student, teacher = inputs(dtype=jnp.float32)
    kernel, teacher_kernel = student.weight.T, teacher.weight.T

    def loss(kernel, teacher_kernel):
        return jaxkd.fused_linear_jsd(
            student.hidden,
            kernel.T,
            teacher.hidden,
            teacher_kernel.T,
            LABELS,
            vocabulary="truncate",
            chunk_size=CHUNK,
        )[0]

    text = jax.jit(jax.grad(loss)).lower(kernel, teacher_kernel).compile().as_text()
    in_loop = computations_of_loops(text)
    assert any("dot" in line for line in in_loop)
    heads = "|".join(f"{rows},{columns}" for rows, columns in HEADS)
    turned = re.compile(rf"= f32\[(?:{heads})\]\S* (copy|transpose)\(")
    assert not [line for line in in_loop if turned.search(line)]


def computations_of_loops(text):
    """The lines of every computation that a while loop runs."""
    computations, name = {}, None
    for line in text.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.-]+) .*\{$", line):
            name = header[1]
            computations[name] = []
        elif name:
            computations[name].append(line)
    reached, waiting = set(), re.findall(r"while\(.*?body=%?([\w.-]+)", text)
    while waiting:
        name = waiting.pop()
        if name in computations and name not in reached:
            reached.add(name)
            waiting += re.findall(r"(?:calls|to_apply|body)=%?([\w.-]+)", "\n".join(computations[name]))
    return [line for name in reached for line in computations[name]]
