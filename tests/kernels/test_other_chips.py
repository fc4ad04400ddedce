"""On TPU and ROCm everything is XLA's: programs lowered without their devices have no kernel in them."""

import jax
import jax.numpy as jnp
import lowering
import pytest

import jaxkd

N, V = 4096, 32003


def jensen_shannon(student, teacher, labels):
    divergence = jaxkd.jensen_shannon(0.5)
    return jaxkd.distillation_loss(student, teacher, labels, divergence=divergence, hard_weight=0.5)[0]


def earth_mover(student, teacher, labels):
    return jaxkd.distillation_loss(student, teacher, labels, divergence=jaxkd.earth_mover)[0]


def top_k(student, teacher, labels):
    return jaxkd.distillation_loss(student, jaxkd.TopKLogProbs.of(teacher, 8), labels)[0]


def cross_entropy(student, teacher, labels):
    return jaxkd.cross_entropy(student, labels, z_loss=1e-4)[0]


def log_probs(student, teacher, labels):
    return jnp.sum(jaxkd.token_log_probs(student, labels))


def info_nce(student, teacher, labels):
    return jaxkd.embedding.info_nce(student.hidden, student.hidden)[0]


@pytest.mark.parametrize("device", [lowering.TPU, lowering.MI300X], ids=lambda device: device.platform)
@pytest.mark.parametrize("loss", [jensen_shannon, earth_mover, top_k, cross_entropy, log_probs, info_nce])
def test_lowers_to_xla_alone(loss, device):
    def source(width):
        hidden, weight = (jax.ShapeDtypeStruct((rows, width), jnp.bfloat16) for rows in (N, V))
        return jaxkd.LinearLogits(hidden, weight)

    text = lowering.lower_for(
        device, jax.value_and_grad(loss), source(64), source(96), jax.ShapeDtypeStruct((N,), jnp.int32)
    ).as_text()
    assert "stablehlo.dot_general" in text
    assert "stablehlo.while" in text  # chunks
    assert "custom_call" not in text


@pytest.mark.parametrize("device", [lowering.TPU, lowering.MI300X], ids=lambda device: device.platform)
@pytest.mark.parametrize("name", ["triton", "mosaic"])
def test_a_kernel_that_is_named_says_what_it_needs(name, device):
    def loss(student):
        return jaxkd.distillation_loss(jaxkd.Logits(student), jaxkd.Logits(student), implementation=name)[0]

    missing = "has no Pallas|is tested from jax 0.11 on"
    with pytest.raises(ValueError, match=f"it needs a CUDA GPU and JAX computes on '{device.platform}'|{missing}"):
        lowering.lower_for(device, loss, jax.ShapeDtypeStruct((64, 128), jnp.float32))
