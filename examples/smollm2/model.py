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


def rotary(x, theta, start=0):
    """Rotate the pairs (x[i], x[i + H/2]) of each head by position * theta^(-2i/H); x is (B, T, heads, H).

    The first position is ``start``.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = (start + jnp.arange(x.shape[1], dtype=jnp.float32))[:, None, None] * frequencies  # (T, 1, H/2)
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

    def __call__(self, x, cache=None, start=0):
        """(B, T, D) to the same; with a ``cache`` x begins at position ``start``, and the new cache comes back too."""
        query, key, value = (
            layer(x).reshape(*x.shape[:2], -1, self.head_dim) for layer in (self.query, self.key, self.value)
        )
        query, key = rotary(query, self.theta, start), rotary(key, self.theta, start)
        if cache is None:
            mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
            return self.out(mixed.reshape(*x.shape[:2], -1))
        key, value = (
            jax.lax.dynamic_update_slice_in_dim(old, new, start, axis=1)
            for old, new in zip(cache, (key, value), strict=True)
        )
        sees = jnp.arange(key.shape[1]) <= start + jnp.arange(x.shape[1])[:, None]  # (T, positions of the cache)
        mixed = jax.nn.dot_product_attention(query, key, value, mask=sees[None, None])
        return self.out(mixed.reshape(*x.shape[:2], -1)), (key, value)


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

    def extend(self, x, cache, start):
        mixed, cache = self.attention(self.attention_norm(x), cache, start)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), cache


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

    def empty_cache(self, batch_size, length):
        """Room for the keys and values of ``length`` positions: a pair for each layer, (B, length, heads, H) each."""

        def room(attention):
            heads = attention.key.out_features // attention.head_dim
            return jnp.zeros((batch_size, length, heads, attention.head_dim), self.embed.dtype)

        return [(room(layer.attention), room(layer.attention)) for layer in self.layers]

    def extend(self, tokens, cache, start):
        """The hidden states of ``tokens`` (B, T) alone, which begin at ``start``, and the cache with theirs in it."""
        x, caches = self.embed(tokens), []
        for layer, old in zip(self.layers, cache, strict=True):
            x, new = layer.extend(x, old, start)
            caches.append(new)
        return self.norm(x), caches


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
