"""Every function that a user's term may have: the same numbers in XLA and in a kernel, or a refusal that says why."""

import cases
import jax
import jax.numpy as jnp
import lowering
import numpy as np
import own_terms
import pytest

import jaxkd
from jaxkd.kernels import CannotRun, Chunk, dispatch, kernel_math, pallas_triton, reference, term_primitives

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
HAS_MOSAIC = jax.__version_info__ >= (0, 11)
needs_mosaic = pytest.mark.skipif(not HAS_MOSAIC, reason="the Mosaic kernel is for jax 0.11 and later")
KERNELS = ["triton", pytest.param("mosaic", marks=needs_mosaic)]
GROUP = 20  # terms in one program
V = 2049


def log_probabilities(seed=0, rows=3, width=V):
    z = np.random.default_rng(seed).normal(scale=2, size=(2, rows, width)).astype(np.float32)
    return jax.nn.log_softmax(jnp.asarray(z))


def terms_and_slopes(rewrite):
    def all_of_them(log_p, log_q):
        divergences = {name: jaxkd.Divergence(term) for name, term in own_terms.TERMS.items()}
        return {name: rewrite(x.term_and_slope)(log_p, log_q) for name, x in divergences.items()}

    return jax.jit(all_of_them)(*log_probabilities())


@pytest.fixture(scope="module")
def plain():
    return terms_and_slopes(lambda function: function)


def test_rewritten_for_a_kernel_they_are_the_same(plain):
    rewritten = terms_and_slopes(kernel_math.with_kernel_math)
    for name, want in plain.items():
        for a, b in zip(rewritten[name], want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=3e-6, err_msg=name)


def test_terms_that_are_known():
    """Of numbers worked by hand, in XLA."""
    p, q = jnp.log(jnp.float32(0.5)), jnp.log(jnp.float32(0.25))
    known = {"logaddexp": np.log(0.75), "float power": 0.125, "kl_div": 0.5 * np.log(2) - 0.25, "xlogy": -np.log(2)}
    for name, value in known.items():
        np.testing.assert_allclose(own_terms.TERMS[name](p, q), value, rtol=1e-5, err_msg=name)


def had_by(kernel):
    return [name for name in own_terms.TERMS if name not in own_terms.LACKING[kernel]]


def groups(kernel):
    names = had_by(kernel)
    return [names[i : i + GROUP] for i in range(0, len(names), GROUP)]


def sum_of(names, plain):
    """One term of several, each of the same size and of a positive sum."""
    factors = {name: float(np.sign(plain[name][0].sum()) / np.abs(plain[name][0]).sum()) for name in names}
    return jaxkd.Divergence(lambda p, q: sum(factor * own_terms.TERMS[name](p, q) for name, factor in factors.items()))


def heads(width=V):
    return (jaxkd.Logits(x) for x in log_probabilities(1, 4, width))


@pytest.mark.parametrize("group", groups("triton"), ids=lambda names: names[0])
def test_values_and_gradients(group, plain, monkeypatch):
    monkeypatch.setattr(pallas_triton, "INTERPRET", True)
    check_against_xla(heads(), "triton", sum_of(group, plain), 2e-5)


def check_against_xla(models, kernel, divergence, tolerance):
    student, teacher = models
    of_kernel, of_xla = (
        cases.value_and_grad(student, teacher, divergence=divergence, chunk_size=4, implementation=name)
        for name in (kernel, "xla")
    )
    assert of_xla[0][0] > 0
    for a, b in zip(jax.tree.leaves(of_kernel), jax.tree.leaves(of_xla), strict=True):
        assert cases.relative_error(a, b) <= tolerance


@pytest.mark.parametrize("kernel", KERNELS)
def test_they_are_lowered(kernel, plain):
    """Whatever a table says that a kernel has."""
    shape = jaxkd.Logits(jax.ShapeDtypeStruct((4, 32000), jnp.float32))
    for group in groups(kernel):
        divergence = sum_of(group, plain)

        def loss(student, teacher, divergence=divergence):
            return jaxkd.distillation_loss(
                student, teacher, divergence=divergence, chunk_size=4, implementation=kernel
            )[0]

        text = lowering.lower_for_h100(jax.value_and_grad(loss), shape, shape).as_text()
        assert {"triton": "gpu.triton", "mosaic": "mosaic_gpu"}[kernel] in text


# Primitives that jax 0.10 does not have, or does not use for these functions.
LATER = {"log2", "one_minus_square", "and uint32", "bitcast_convert_type uint32"}


@pytest.mark.parametrize("kernel", KERNELS)
def test_nothing_is_in_a_table_that_no_test_lowers(kernel):
    form = term_primitives.FORMS[kernel]
    used = {x for name in had_by(kernel) for x in term_primitives.operations(form(divergence_of(name)))}
    unused = term_primitives.TABLES[kernel] - used
    assert unused <= (set() if HAS_MOSAIC else LATER)


def divergence_of(name):
    return jaxkd.Divergence(own_terms.TERMS[name])


def for_h100(implementation, divergence):
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=lowering.H100)
    with jax.sharding.use_abstract_mesh(mesh):
        return dispatch.row_losses_for(implementation, Chunk(4, 32000, 32000, jnp.dtype(jnp.float32)), divergence)


NAMED = {"round": "round", "exact gelu": "erfc", "select": "stack", "polyval": "array of shape", "floor": "floor"}


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_a_kernel_lacks_is_refused_by_name(kernel):
    for name in own_terms.LACKING[kernel]:
        with pytest.raises(CannotRun, match=rf'implementation="{kernel}".*has .*{NAMED.get(name, "")}.*"xla" or None'):
            for_h100(kernel, divergence_of(name))


def test_none_takes_the_first_that_has_all():
    order = ["mosaic", "triton"] if HAS_MOSAIC else ["triton"]
    for name in own_terms.TERMS:
        first = next((x for x in order if name not in own_terms.LACKING[x]), None)
        want = dispatch._on_cuda[first] if first else reference.row_losses
        assert for_h100(None, divergence_of(name)) is want, name


@pytest.mark.parametrize("kernel", term_primitives.TABLES)
@pytest.mark.parametrize("name", cases.DIVERGENCES)
def test_divergences_that_jaxkd_has_lack_nothing(name, kernel):
    assert not term_primitives.lacking(kernel, cases.DIVERGENCES[name].make())


def test_a_term_is_looked_at_once():
    term_primitives._lacking.cache_clear()
    for beta in (0.1, 0.2, jnp.float32(0.3)):
        term_primitives.lacking("triton", jaxkd.jensen_shannon(beta))
    assert term_primitives._lacking.cache_info().misses == 1


@pytest.mark.parametrize("name", cases.DIVERGENCES)
def test_where_both_sides_are_closed_divergences_that_jaxkd_has_are_0(name):
    closed = jnp.full(1, -jnp.inf)
    divergence = cases.DIVERGENCES[name].make()
    values = kernel_math.base_2_term_and_slope_of(divergence)(closed, closed, *map(jnp.float32, divergence.parameters))
    assert not np.any(values)


def test_where_both_sides_are_closed_a_term_of_ones_own_is_0_too():
    """A block that a row does not fill holds -inf: `cos` is not 0 there, and `subtract` is no number."""
    log2_p, log2_q = jnp.array([-jnp.inf, -jnp.inf, -1.0]), jnp.array([-jnp.inf, -2.0, -2.0])
    for name in ("cos", "subtract", "tanh", "integer power"):
        values = kernel_math.base_2_term_and_slope_of(divergence_of(name))(log2_p, log2_q)
        want = divergence_of(name).term_and_slope(log2_p * np.log(2), log2_q * np.log(2))
        for a, b in zip(values, want, strict=True):
            assert a[0] == 0
            np.testing.assert_allclose(a[1:], b[1:], rtol=1e-6)


def power(p, q, exponent):
    return jnp.exp(p) * jnp.exp(q) ** exponent


@pytest.mark.parametrize("exponent", [2, 0.5])
def test_parameters(exponent, monkeypatch):
    monkeypatch.setattr(pallas_triton, "INTERPRET", True)
    check_against_xla(heads(123), "triton", jaxkd.Divergence(power, (exponent,)), 1e-5)


def test_under_x64_a_float32_call_is_the_same(x64):
    assert not term_primitives.lacking("triton", divergence_of("where"))
    assert not term_primitives.lacking("mosaic", divergence_of("isnan"))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kernel", "group"), [(kernel, group) for kernel in ("triton", "mosaic") for group in groups(kernel)]
)
def test_on_a_gpu(kernel, group, plain):
    if kernel == "mosaic" and not HAS_MOSAIC:
        pytest.skip("the Mosaic kernel is for jax 0.11 and later")
    check_against_xla(heads(32000), kernel, sum_of(group, plain), 1e-3)  # `tanh` alone has that: 1 - tanh^2 cancels
