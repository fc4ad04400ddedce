"""The kernels lowered to CUDA without a GPU, and compiled to machine code where the `triton` package is installed."""

import itertools
import re
import subprocess

import cases
import jax
import jax.numpy as jnp
import jaxprs
import lowering
import pytest

import jaxkd
from jaxkd.loop import chunk_size

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
needs_mosaic = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the Mosaic kernel is for jax 0.11 and later")

N, D, D_TEACHER, V = 64, 32, 48, 50257


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
# Every divergence in one of the types; in the others, and with other parameters, they are many programs more.
EVERY_DIVERGENCE = [
    (name, dtype)
    if name in cases.ONE_OF_EACH and DTYPES[cases.ONE_OF_EACH.index(name) % 3] is dtype
    else slow(name, dtype)
    for name in cases.DIVERGENCES
    for dtype in DTYPES
]


def lowered(name, *, width=V, teacher_width=V, dtype=jnp.bfloat16, labelled=True, differentiate=True, **options):
    def source(hidden, width):
        return jaxkd.LinearLogits(*(jax.ShapeDtypeStruct((size, hidden), dtype) for size in (N, width)))

    def loss(student, teacher, labels, temperature):
        return jaxkd.distillation_loss(
            student,
            teacher,
            labels,
            divergence=cases.DIVERGENCES[name].make(),
            temperature=temperature,
            hard_weight=0.5 if labelled else 0.0,
            **{"implementation": "triton", "chunk_size": N} | options,
        )

    return lowering.lower_for_h100(
        jax.value_and_grad(loss, has_aux=True) if differentiate else loss,
        source(D, width),
        source(D_TEACHER, teacher_width),
        jax.ShapeDtypeStruct((N,), jnp.int32) if labelled else None,
        jax.ShapeDtypeStruct((), jnp.float32),
    )


@pytest.mark.parametrize(("name", "dtype"), EVERY_DIVERGENCE)
def test_every_divergence(name, dtype):
    assert len(lowering.triton_calls(lowered(name, dtype=dtype))) == 1


WIDTHS = [(123, 123), (50257, 50304), (50304, 50257), (128256, 128256)]
FEW = [
    ("truncate", (123, 123), True, True),
    ("truncate", (50257, 50304), False, True),
    ("truncate", (50304, 50257), True, False),
    ("mask", (50257, 50304), True, True),
    ("mask", (50304, 50257), False, False),
    ("mask", (128256, 128256), False, True),
]
EVERY_VARIANT = itertools.product(["truncate", "mask"], WIDTHS, [False, True], [False, True])


@pytest.mark.parametrize(
    ("vocabulary", "widths", "differentiate", "labelled"),
    [variant if variant in FEW else slow(*variant) for variant in EVERY_VARIANT],
)
def test_every_variant(labelled, differentiate, widths, vocabulary):
    call = lowered(
        "jensen_shannon",
        width=widths[0],
        teacher_width=widths[1],
        labelled=labelled,
        differentiate=differentiate,
        vocabulary=vocabulary,
    )
    assert len(lowering.triton_calls(call)) == 1


def test_every_access_is_masked():
    """Unmasked, a block that overhangs a row would write into the next."""
    (call,) = lowering.triton_calls(lowered("jensen_shannon"))
    accesses = re.findall(r"tt\.(load|store) (.*?) : tensor<", lowering.triton_ir(call))
    assert {"load", "store"} == {kind for kind, _ in accesses}
    operands = {"load": 2, "store": 3}  # pointers, (values,) mask
    assert all(len(re.findall(r"%\w+", rest)) >= operands[kind] for kind, rest in accesses)


def is_triton(lowered):
    return "custom_call @__gpu$xla.gpu.triton" in lowered.as_text()


def is_mosaic(lowered):
    return "custom_call @mosaic_gpu" in lowered.as_text()


def only_kernel(text):
    """The line of a program's only call of a kernel."""
    (call,) = [x for x in text.splitlines() if "custom_call @mosaic_gpu" in x or "gpu.triton" in x]
    return call


def test_triton_is_chosen_on_a_gpu_by_default():
    """Widths that differ are nothing for the Mosaic kernel."""
    assert is_triton(lowered("jensen_shannon", teacher_width=V - 1, vocabulary="truncate", implementation=None))


def test_the_first_chunk_writes_the_gradient_of_the_head():
    """It is run before the loop, and nothing is filled with zeros that the other chunks would be added to."""
    text = lowered("jensen_shannon", chunk_size=16).as_text()
    assert text.count("gpu.triton") == 2
    constants = re.findall(r"(%\S+) = stablehlo.constant dense<0.0", text)
    filled = re.findall(rf"stablehlo.broadcast_in_dim (%\S+),.*tensor<{V}x{D}xf32>", text)
    assert constants
    assert filled  # by the factor that normalises
    assert not set(constants) & set(filled)


@needs_mosaic
def test_a_vocabulary_that_cannot_be_copied_is_filled_up():
    text = lowered("jensen_shannon", width=50257, teacher_width=50257, implementation=None)
    assert is_mosaic(text)
    assert "tensor<50272x" in text.as_text()
    large = lowered("jensen_shannon", width=2**22 + 1, teacher_width=2**22 + 1, implementation=None)
    assert is_triton(large)  # its copy would take more than the kernel gives


@needs_mosaic
def test_mosaic_is_chosen_on_an_h100_by_default():
    text = lowered("jensen_shannon", width=128256, teacher_width=128256, implementation=None)
    assert is_mosaic(text)
    assert not is_triton(text)


@needs_mosaic
@pytest.mark.parametrize(("name", "dtype"), EVERY_DIVERGENCE)
def test_every_divergence_of_mosaic(name, dtype):
    assert is_mosaic(lowered(name, width=32000, teacher_width=32000, dtype=dtype, implementation="mosaic"))


@needs_mosaic
@pytest.mark.parametrize(
    ("width", "differentiate", "labelled"),
    [
        (width, differentiate, labelled) if i % 4 in (0, 3) else slow(width, differentiate, labelled)
        for i, (width, differentiate, labelled) in enumerate(
            itertools.product([32000, 128256, 151936], [False, True], [False, True])
        )
    ],
)
def test_every_variant_of_mosaic(labelled, differentiate, width):
    options = {"labelled": labelled, "differentiate": differentiate, "implementation": "mosaic"}
    assert is_mosaic(lowered("jensen_shannon", width=width, teacher_width=width, **options))


@needs_mosaic
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 1e-3}])
def test_one_head_of_mosaic(options):
    def loss(hidden, weight, labels):
        return jaxkd.cross_entropy(jaxkd.LinearLogits(hidden, weight), labels, chunk_size=16, **options)[0]

    shapes = [jax.ShapeDtypeStruct((size, D), jnp.bfloat16) for size in (N, 128256)]
    assert is_mosaic(lowering.lower_for_h100(jax.grad(loss), *shapes, jax.ShapeDtypeStruct((N,), jnp.int32)))


@needs_mosaic
@pytest.mark.parametrize("num_heads", [1, 2])
@pytest.mark.parametrize("width", [1024, 16416, 32000, 50304, 128256, 151936, 262144, 294912])
def test_parts_of_mosaic(width, num_heads):
    """The copies and what is held are the whole of each part, and no copy is empty."""
    from jaxkd.kernels.row_parts import PARTS, STEP, Parts

    parts = Parts.of(width, num_heads)
    assert (PARTS - 1) * parts.columns + parts.last_columns == width
    for columns in (parts.columns, parts.last_columns):
        copies = parts.copies(columns)
        assert parts.held * STEP + sum(size for *_, size in copies) == columns
        assert all(size > 0 for *_, size in copies)
        assert [first for first, *_ in copies] == [parts.held, *(end for _, end, _ in copies[:-1])]
        assert copies[-1][1] == parts.num_steps


@pytest.mark.parametrize("kernel", ["triton", pytest.param("mosaic", marks=needs_mosaic)])
def test_pieces_under_x64(kernel, monkeypatch, x64):
    monkeypatch.setattr(chunk_size, "rows_of_piece", lambda *_: 8)
    text = lowered("jensen_shannon", width=32000, teacher_width=32000, implementation=kernel)
    assert {"triton": is_triton, "mosaic": is_mosaic}[kernel](text)


@pytest.mark.parametrize("kernel", ["triton", pytest.param("mosaic", marks=needs_mosaic), None])
def test_pieces_are_written_in_place(kernel, monkeypatch):
    monkeypatch.setattr(chunk_size, "rows_of_piece", lambda *_: 8)
    text = lowered("jensen_shannon", width=32000, teacher_width=32000, implementation=kernel).as_text()
    assert "output_operand_alias<" in only_kernel(text)
    assert "tensor<8x32000xf32>" in text or "tensor<256000xf32>" in text
    assert f"tensor<{N}x32000xf32>" not in text


@pytest.mark.parametrize("kernel", ["triton", pytest.param("mosaic", marks=needs_mosaic)])
@pytest.mark.parametrize("in_pieces", [False, True])
@pytest.mark.parametrize("transform", ["vmap", "checkpoint"])
def test_transforms_keep_the_kernel(transform, in_pieces, kernel, monkeypatch):
    """It runs once with a gradient, which is all that reads what it writes in place."""
    monkeypatch.setattr(chunk_size, "rows_of_piece", lambda *_: 8 if in_pieces else 64)

    def loss(hidden, weight):
        student, teacher = jaxkd.LinearLogits(hidden, weight), jaxkd.LinearLogits(hidden[:, ::-1], weight)
        return jaxkd.distillation_loss(student, teacher, chunk_size=N, implementation=kernel)[0]

    shapes = [jax.ShapeDtypeStruct((size, D), jnp.bfloat16) for size in (N, 32000)]
    if transform == "vmap":
        shapes[0] = jax.ShapeDtypeStruct((3, N, D), jnp.bfloat16)
        function = jax.vmap(jax.grad(loss), (0, None))
    else:
        function = jax.grad(jax.checkpoint(loss))
    text = lowering.lower_for_h100(function, *shapes).as_text()
    assert "xbf16>)" in only_kernel(text)
    if transform == "vmap" and kernel == "mosaic":  # nothing is fused with what writes in place
        assert text.count("optimization_barrier") == 2


@needs_mosaic
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"width": 32000, "teacher_width": 32032}, "32000.*32032"),
        ({"width": 64, "teacher_width": 64}, "64"),
        ({"width": 2**20, "teacher_width": 2**20}, "1048576.*shared memory"),
    ],
)
def test_mosaic_says_why_it_cannot(options, reason):
    with pytest.raises(ValueError, match=f"mosaic.*{reason}"):
        lowered("jensen_shannon", implementation="mosaic", vocabulary="truncate", **options)


@needs_mosaic
def test_mosaic_refuses_float64(x64):
    with pytest.raises(ValueError, match=r"mosaic.*float64"):
        lowered("jensen_shannon", width=32000, teacher_width=32000, dtype=jnp.float64, implementation="mosaic")


def test_never_for_float64(x64):
    for width in (V, 32000):
        text = lowered("jensen_shannon", width=width, teacher_width=width, dtype=jnp.float64, implementation=None)
        assert not is_triton(text)
        assert not is_mosaic(text)


def test_logits_stay_float32_between_product_and_kernel():
    """bfloat16 in, float32 logits, a bfloat16 gradient out: what near convergence needs, and no more."""
    student, teacher = (
        jaxkd.LinearLogits(jnp.ones((N, hidden), jnp.bfloat16), jnp.ones((V, hidden), jnp.bfloat16))
        for hidden in (D, D_TEACHER)
    )

    def loss(student):
        return jaxkd.distillation_loss(student, teacher, chunk_size=N, implementation="triton")[0]

    mesh = jax.sharding.AbstractMesh((), (), abstract_device=lowering.H100)
    with jax.sharding.use_abstract_mesh(mesh):
        jaxpr = jax.make_jaxpr(jax.grad(loss))(student)
    (call,) = [x for x in jaxprs.equations(jaxpr) if x.primitive.name == "pallas_call"]
    assert [v.aval.dtype for v in call.invars if v.aval.ndim == 2] == [jnp.float32] * 2 + [jnp.bfloat16]
    assert [v.aval.dtype for v in call.outvars if v.aval.ndim == 2] == [jnp.bfloat16]


@pytest.mark.parametrize("name", cases.ONE_OF_EACH)
def test_machine_code_does_not_spill(name, tmp_path):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    (call,) = lowering.triton_calls(lowered(name))
    source = tmp_path / "rows.ttir"
    source.write_text(lowering.triton_ir(call))
    options = {key: call[key].value for key in ("num_warps", "num_stages")} | {"enable_fp_fusion": True}
    compiled = triton.compile(str(source), target=GPUTarget("cuda", 90, 32), options=options)
    assert ".target sm_90a" in compiled.asm["ptx"]
    cubin = tmp_path / "rows.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
    usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "REG:" in usage
    assert "STACK:0 " in usage, usage
    assert "LOCAL:0 " in usage, usage
