"""A live PyTorch teacher: its logits as LinearLogits rebuilds them, for the families that differ in their heads."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import jaxkd
from torch_bridge import LiveTeacher

SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA_LIKE = {**SIZES, **HEADS, "initializer_range": 0.2}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

# The class's first half, its configuration, and which parts its head has beside a weight.
FAMILIES = {
    "Llama, tied": ("Llama", {**LLAMA_LIKE, "tie_word_embeddings": True}, {}),
    "Llama, untied": ("Llama", {**LLAMA_LIKE, "tie_word_embeddings": False}, {}),
    "GPT2": ("GPT2", {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, **ENDS}, {}),
    "Gemma2": ("Gemma2", {**LLAMA_LIKE, "head_dim": 8, "final_logit_softcapping": 20.0}, {"softcap": 20.0}),
    "Cohere": ("Cohere", {**LLAMA_LIKE, "logit_scale": 0.0625, **ENDS}, {"scale": 0.0625}),
    "Granite": ("Granite", {**LLAMA_LIKE, "logits_scaling": 8.0}, {"scale": 0.125}),
    "HyperCLOVAX": ("HyperCLOVAX", {**LLAMA_LIKE, "logits_scaling": 0.25, "head_dim": 8}, {"scale": 0.25}),
    "Phi": ("Phi", {**SIZES, "num_attention_heads": 4, **ENDS}, {"bias": True}),
    "OPT, projected": (
        "OPT",
        {"vocab_size": 61, "hidden_size": 32, "ffn_dim": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"word_embed_proj_dim": 24, **ENDS},
        {},
    ),
    "Bloom": ("Bloom", {"vocab_size": 61, "hidden_size": 32, "n_layer": 2, "n_head": 4, **ENDS}, {}),
    "Mixtral": ("Mixtral", {**LLAMA_LIKE, "num_local_experts": 4}, {}),
    "Mamba": ("Mamba", {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, **ENDS}, {}),
}
TOKENS = np.random.default_rng(0).integers(3, 61, (2, 9))


def make(family, dtype=torch.float32):
    name, sizes, _ = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**sizes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().to(dtype)
    if (head := model.get_output_embeddings()).bias is not None:
        torch.nn.init.normal_(head.bias)
    return model


def logits_of(source):
    return np.asarray(source.flat().prepared().logits()).reshape(*source.leading_shape, -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_models_own(family, dtype):
    model = make(family, dtype)
    with torch.inference_mode():
        expected = model(input_ids=torch.from_numpy(TOKENS)).logits.float().numpy()
    teacher = LiveTeacher(model)
    source = teacher(TOKENS)
    assert source.hidden.dtype == jnp.dtype(str(dtype).removeprefix("torch."))
    bound = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    np.testing.assert_allclose(logits_of(source), expected, rtol=0, atol=bound * np.abs(expected).max())
    parts = {name: value for name, value in teacher.head.items() if value is not None and name != "weight"}
    assert {name: name == "bias" or value for name, value in parts.items()} == FAMILIES[family][2]


def test_padding_and_every_kind_of_array():
    teacher = LiveTeacher(make("Llama, tied"))
    mask = np.ones_like(TOKENS)
    mask[1, 6:] = 0
    tensors = teacher(torch.from_numpy(TOKENS), attention_mask=torch.from_numpy(mask))
    arrays = teacher(jnp.asarray(TOKENS, jnp.int32), attention_mask=jnp.asarray(mask))
    np.testing.assert_array_equal(tensors.hidden, arrays.hidden)
    short = teacher(TOKENS[1:, :6])
    np.testing.assert_allclose(tensors.hidden[1, :6], short.hidden[0], atol=1e-5)


def test_the_head_crosses_once_and_nothing_is_copied():
    model = make("Llama, tied")
    teacher = LiveTeacher(model)
    first, second = teacher(TOKENS), teacher(TOKENS)
    assert first.weight is second.weight
    assert first.weight.unsafe_buffer_pointer() == model.lm_head.weight.data_ptr()


def test_no_logits_are_formed():
    model = make("Llama, tied")
    teacher = LiveTeacher(model)
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("the head was multiplied"))
    assert teacher(TOKENS).hidden.shape == (2, 9, 32)


def test_hidden_states_outlive_their_tensor():
    """PyTorch gets the memory back only when JAX has read it."""
    total = jax.jit(lambda source: jnp.sum(jnp.sin(source.hidden)) + jnp.sum(source.hidden @ source.weight.T))
    teacher = LiveTeacher(make("Llama, tied"))
    tokens = np.tile(TOKENS, (64, 10))
    expected = float(total(teacher(tokens)))
    results = []
    for _ in range(20):
        results.append(total(teacher(tokens)))
        torch.full((128, 90, 32), float("nan"))
    gc.collect()
    np.testing.assert_allclose(results, expected, rtol=1e-5)


def test_a_flax_student_learns_from_it():
    source = LiveTeacher(make("Gemma2"))(TOKENS)
    student = jaxkd.LinearLogits(jnp.ones((2, 9, 5)), jnp.zeros((61, 5)))
    (loss, _), gradients = jax.jit(jax.value_and_grad(jaxkd.distillation_loss, has_aux=True))(student, source)
    log_p = jax.nn.log_softmax(logits_of(source))
    np.testing.assert_allclose(loss, np.mean(np.sum(np.exp(log_p) * (log_p + np.log(61)), -1)), rtol=1e-5)
    assert jnp.abs(gradients.weight).max() > 0


def wrap_forward(model, change):
    forward = model.forward

    def changed(**inputs):
        output = forward(**inputs)
        output.logits = change(output.logits)
        return output

    model.forward = changed
    return model


@pytest.mark.parametrize(
    "change",
    [
        lambda z: z * 1.01,
        lambda z: z + torch.arange(61) * 0.1,
        lambda z: 30 * torch.tanh(z / 30),  # undeclared
        lambda z: z.log_softmax(-1),
    ],
)
def test_other_functions_of_the_head_are_refused(change):
    with pytest.raises(ValueError, match=r"`model`, a LlamaForCausalLM, makes its logits .*jaxkd\.Logits"):
        LiveTeacher(wrap_forward(make("Llama, tied"), change))


def test_a_declared_softcap_that_is_not_applied_is_noticed():
    model = make("Llama, tied")
    model.config.final_logit_softcapping = 30.0
    assert LiveTeacher(model).head["softcap"] is None


def test_logits_of_another_width_are_refused():
    with pytest.raises(ValueError, match=r"\(1, 4, 60\) where its head gives \(1, 4, 61\)"):
        LiveTeacher(wrap_forward(make("Llama, tied"), lambda z: z[..., :60]))


def test_models_that_cannot_teach():
    with pytest.raises(TypeError, match=r"`model` is a Linear; give a causal language model"):
        LiveTeacher(torch.nn.Linear(2, 3))
    with pytest.raises(TypeError, match=r"a LlamaModel, has no floating-point head.*NoneType"):
        LiveTeacher(make("Llama, tied").model)
    with pytest.raises(ValueError, match=r"training mode.*model\.eval\(\)"):
        LiveTeacher(make("Llama, tied").train())


def test_inputs_that_are_no_tokens():
    teacher = LiveTeacher(make("Llama, tied"))
    with pytest.raises(TypeError, match=r"`tokens` is torch\.float32 \(2, 9\); give an array of token ids"):
        teacher(TOKENS.astype(np.float32))
    with pytest.raises(TypeError, match=r"`tokens` is torch\.int64 \(9,\)"):
        teacher(TOKENS[0])
    with pytest.raises(TypeError, match=r"traced \(int32\[2,9\]\).*outside jax\.jit"):
        jax.jit(lambda tokens: teacher(tokens).hidden)(jnp.asarray(TOKENS, jnp.int32))
