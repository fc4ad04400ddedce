"""Terms that a user may write: each elementwise function of JAX that makes sense of a log-probability."""

import jax
import jax.numpy as jnp
from jax import lax, nn
from jax.scipy import special


@jax.custom_jvp
def softly(x):
    return jnp.log1p(jnp.exp(x))


@softly.defjvp
def _(primals, tangents):
    return softly(*primals), tangents[0] * nn.sigmoid(*primals)


# `p` and `q` are log-probabilities, so that `e(q)` is in (0, 1).
e = jnp.exp
TERMS = {
    "add": lambda p, q: p + q,
    "subtract": lambda p, q: p - q,
    "multiply": lambda p, q: p * q,
    "divide": lambda p, q: p / (1 - q),
    "reciprocal": lambda p, q: jnp.reciprocal(1 - q),
    "negative": lambda p, q: -q,
    "abs": lambda p, q: jnp.abs(p - q),
    "sign": lambda p, q: jnp.sign(p - q) * q,
    "minimum": lambda p, q: jnp.minimum(p, q),
    "maximum": lambda p, q: jnp.maximum(p, q),
    "fmin": lambda p, q: jnp.fmin(p, q),
    "fmax": lambda p, q: jnp.fmax(p, q),
    "clip": lambda p, q: jnp.clip(q, -3, -1),
    "lax.clamp": lambda p, q: lax.clamp(-3.0, q, -1.0),
    "where": lambda p, q: jnp.where(p > q, p, 2 * q),
    "exp": lambda p, q: e(q),
    "exp2": lambda p, q: jnp.exp2(q),
    "log": lambda p, q: jnp.log(1 - q),
    "log2": lambda p, q: jnp.log2(1 - q),
    "log10": lambda p, q: jnp.log10(1 - q),
    "log1p": lambda p, q: jnp.log1p(e(q)),
    "expm1": lambda p, q: jnp.expm1(q - p),
    "logaddexp": jnp.logaddexp,
    "logaddexp2": jnp.logaddexp2,
    "integer power": lambda p, q: q**3,
    "negative power": lambda p, q: (1 - q) ** -2,
    "float power": lambda p, q: e(q) ** 1.5,
    "power": lambda p, q: jnp.power(1 - q, e(p)),
    "square": lambda p, q: jnp.square(p - q),
    "sqrt": lambda p, q: jnp.sqrt(e(q)),
    "rsqrt": lambda p, q: lax.rsqrt(1 - q),
    "cbrt": lambda p, q: jnp.cbrt(1 - q),
    "hypot": lambda p, q: jnp.hypot(p, q),
    "sin": lambda p, q: jnp.sin(q),
    "cos": lambda p, q: jnp.cos(q),
    "tan": lambda p, q: jnp.tan(e(q)),
    "sinh": lambda p, q: jnp.sinh(e(q)),
    "cosh": lambda p, q: jnp.cosh(e(q)),
    "tanh": lambda p, q: jnp.tanh(q),
    "arcsin": lambda p, q: jnp.arcsin(e(q) / 2),
    "arccos": lambda p, q: jnp.arccos(e(q) / 2),
    "arctan": lambda p, q: jnp.arctan(q),
    "arctan2": lambda p, q: jnp.arctan2(p, q),
    "arcsinh": lambda p, q: jnp.arcsinh(q),
    "arccosh": lambda p, q: jnp.arccosh(2 - q),
    "arctanh": lambda p, q: jnp.arctanh(e(q) / 2),
    "sigmoid": lambda p, q: nn.sigmoid(q),
    "log_sigmoid": lambda p, q: nn.log_sigmoid(q),
    "softplus": lambda p, q: nn.softplus(q),
    "relu": lambda p, q: nn.relu(p - q),
    "leaky_relu": lambda p, q: nn.leaky_relu(p - q),
    "elu": lambda p, q: nn.elu(p - q),
    "silu": lambda p, q: nn.silu(p - q),
    "gelu": lambda p, q: nn.gelu(p - q),
    "exact gelu": lambda p, q: nn.gelu(p - q, approximate=False),
    "erf": lambda p, q: special.erf(q),
    "erfc": lambda p, q: special.erfc(q),
    "erfinv": lambda p, q: special.erfinv(e(q) / 2),
    "gammaln": lambda p, q: special.gammaln(1 - q),
    "xlogy": lambda p, q: special.xlogy(e(p), e(q)),
    "xlog1py": lambda p, q: special.xlog1py(e(p), e(q)),
    "entr": lambda p, q: special.entr(e(q)),
    "rel_entr": lambda p, q: special.rel_entr(e(p), e(q)),
    "kl_div": lambda p, q: special.kl_div(e(p), e(q)),
    "logit": lambda p, q: special.logit(e(q) / 2),
    "isnan": lambda p, q: jnp.where(jnp.isnan(q), 0, q),
    "isinf": lambda p, q: jnp.where(jnp.isinf(q), 0, q),
    "isneginf": lambda p, q: jnp.where(jnp.isneginf(q), 0, q),
    "isfinite": lambda p, q: jnp.where(jnp.isfinite(q), q, 0),
    "nan_to_num": lambda p, q: jnp.nan_to_num(q),
    "floor": lambda p, q: jnp.floor(q) * q,
    "ceil": lambda p, q: jnp.ceil(q) * q,
    "round": lambda p, q: jnp.round(q) * q,
    "remainder": lambda p, q: jnp.remainder(q, 2.0),
    "copysign": lambda p, q: jnp.copysign(p, q),
    "comparisons": lambda p, q: jnp.where((p >= q) & (p != q) | (q <= -3) ^ (q == p), p, 2 * q),
    "logical": lambda p, q: jnp.where(jnp.logical_and(p > q, jnp.logical_not(q < -3)), p, 2 * q),
    "bool as number": lambda p, q: (p > q) * q,
    "astype float": lambda p, q: (p > q).astype(jnp.float32) * q,
    "astype integer": lambda p, q: q.astype(jnp.int32).astype(jnp.float32) * q,
    "astype bfloat16": lambda p, q: q.astype(jnp.bfloat16).astype(jnp.float32),
    "astype float16": lambda p, q: q.astype(jnp.float16).astype(jnp.float32),
    "stop_gradient": lambda p, q: lax.stop_gradient(q) * q,
    "zeros_like": lambda p, q: jnp.where(p > q, jnp.zeros_like(q), q),
    "select": lambda p, q: jnp.select([q > -1, q > -3], [q, 2 * p], 0.0),
    "polyval": lambda p, q: jnp.polyval(jnp.array([1.0, -2.0, 3.0]), e(q)),
    "jit": lambda p, q: jax.jit(jnp.expm1)(q - p),
    "checkpoint": lambda p, q: jax.checkpoint(jnp.expm1)(q - p),
    "custom_jvp": lambda p, q: softly(q),
    "grad": lambda p, q: jax.grad(lambda x: jnp.sum(jnp.logaddexp(p, x)))(q),
}
# What a kernel lacks of them.
LACKING = {
    "triton": {"exact gelu", "erf", "erfc", "gammaln", "round", "select", "polyval"},
    "mosaic": {
        "float power",
        "power",
        "cbrt",
        "tan",
        "sinh",
        "cosh",
        "arcsin",
        "arccos",
        "arctan",
        "arcsinh",
        "arccosh",
    }
    | {"arctanh", "exact gelu", "erfc", "erfinv", "gammaln", "isfinite", "floor", "ceil", "remainder", "copysign"}
    | {"select", "polyval"},
}
