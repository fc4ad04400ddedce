"""The student: a Flax NNX decoder of the Llama family, built from some of a PyTorch teacher's layers."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from torch_bridge import to_jax

# Flax parameter -> PyTorch weight, relative to a layer. A Flax kernel is the transpose of a PyTorch weight.
LAYER_NAMES = {
    ("attention_norm", "scale"): "input_layernorm.weight",
    ("attention", "query", "kernel"): "self_attn.q_proj.weight",
    ("attention", "key", "kernel"): "self_attn.k_proj.weight",
    ("attention", "value", "kernel"): "self_attn.v_proj.weight",
    ("attention", "out", "kernel"): "self_attn.o_proj.weight",
    ("mlp_norm", "scale"): "post_attention_layernorm.weight",
    ("mlp", "gate", "kernel"): "mlp.gate_proj.weight",
    ("mlp", "up", "kernel"): "mlp.up_proj.weight",
    ("mlp", "down", "kernel"): "mlp.down_proj.weight",
}


def rotary(x, theta):
    """Rotate the pairs (x[i], x[i + H/2]) of each head by position * theta^(-2i/H); x is (B, T, heads, H)."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None, None] * frequencies  # (T, 1, H/2)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class Attention(nnx.Module):
    """Causal self-attention in which groups of query heads share a key and a value head."""

    def __init__(self, config, *, dtype, rngs):
        def linear(features_in, features_out):
            return nnx.Linear(features_in, features_out, use_bias=False, dtype=dtype, rngs=rngs)

        self.theta, self.head_dim = config.rope_parameters["rope_theta"], config.head_dim
        self.query = linear(config.hidden_size, config.num_attention_heads * self.head_dim)
        self.key = linear(config.hidden_size, config.num_key_value_heads * self.head_dim)
        self.value = linear(config.hidden_size, config.num_key_value_heads * self.head_dim)
        self.out = linear(config.num_attention_heads * self.head_dim, config.hidden_size)

    def __call__(self, x):
        query, key, value = (
            layer(x).reshape(*x.shape[:2], -1, self.head_dim) for layer in (self.query, self.key, self.value)
        )
        query, key = rotary(query, self.theta), rotary(key, self.theta)
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        return self.out(mixed.reshape(*x.shape[:2], -1))


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config, *, dtype, rngs):
        def linear(features_in, features_out):
            return nnx.Linear(features_in, features_out, use_bias=False, dtype=dtype, rngs=rngs)

        self.gate = linear(config.hidden_size, config.intermediate_size)
        self.up = linear(config.hidden_size, config.intermediate_size)
        self.down = linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x):
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


class Layer(nnx.Module):
    """One pre-norm decoder layer."""

    def __init__(self, config, *, dtype, rngs):
        def norm():
            return nnx.RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, dtype=dtype, rngs=rngs)

        self.attention_norm, self.mlp_norm = norm(), norm()
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nnx.Module):
    """Tokens (B, T) to last hidden states (B, T, D). The head is the embedding: ``head`` is (V, D)."""

    def __init__(self, config, num_layers, *, dtype, rngs):
        self.embed = nnx.Embed(config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.layers = nnx.List([Layer(config, dtype=dtype, rngs=rngs) for _ in range(num_layers)])
        self.norm = nnx.RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, dtype=dtype, rngs=rngs)

    @property
    def head(self):
        return self.embed.embedding[...]

    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


def evenly_spaced(num_layers, keep):
    """``keep`` of the layers 0..num_layers-1, evenly spaced, the first and the last among them."""
    return np.linspace(0, num_layers - 1, keep).round().astype(int).tolist()


def student_from_teacher(teacher, num_layers, dtype=jnp.float32):
    """Build a ``Decoder`` with ``num_layers`` evenly spaced layers of a transformers Llama.

    The parameters are float32 whatever the teacher's type is; ``dtype`` is what the student computes in.
    """
    config = teacher.config
    model = nnx.eval_shape(lambda: Decoder(config, num_layers, dtype=dtype, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)

    names: dict[tuple, str] = {("embed", "embedding"): "embed_tokens.weight", ("norm", "scale"): "norm.weight"}
    for ours, theirs in enumerate(evenly_spaced(config.num_hidden_layers, num_layers)):
        names |= {("layers", ours, *path): f"layers.{theirs}.{name}" for path, name in LAYER_NAMES.items()}

    weights = teacher.model.state_dict()

    def fill(path, parameter):
        weight = to_jax(weights[names[path]].float().contiguous())
        return parameter.replace(weight.T if path[-1] == "kernel" else weight)

    return nnx.merge(graphdef, nnx.map_state(fill, state))
