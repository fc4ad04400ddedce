"""How much memory the loss and its gradients take: jaxkd's beside the dense formula, as XLA compiles them."""

from typing import Any

import jax
import jax.numpy as jnp

import jaxkd


def dense_loss(hidden, head, teacher_hidden, teacher_head, labels, *, divergence, temperature):
    """Soft plus hard loss as one would write it, with both (N, V) logits in memory."""
    student = jnp.matmul(hidden, head.T.astype(hidden.dtype), preferred_element_type=jnp.float32)
    teacher = jnp.matmul(teacher_hidden, teacher_head.T.astype(hidden.dtype), preferred_element_type=jnp.float32)
    log_p = jax.nn.log_softmax(jax.lax.stop_gradient(teacher) / temperature)
    log_q = jax.nn.log_softmax(student / temperature)
    soft = divergence.term(log_p, log_q, *divergence.parameters).sum(axis=-1)
    hard = -jnp.take_along_axis(jax.nn.log_softmax(student), labels[:, None], axis=-1)[:, 0]
    return jnp.mean(soft + hard)


def fused_loss(hidden, head, teacher_hidden, teacher_head, labels, *, divergence, temperature, chunk_size):
    """The same number by jaxkd."""
    student, teacher = jaxkd.LinearLogits(hidden, head), jaxkd.LinearLogits(teacher_hidden, teacher_head)
    loss, _ = jaxkd.distillation_loss(
        student,
        teacher,
        labels,
        divergence=divergence,
        temperature=temperature,
        hard_weight=1.0,
        chunk_size=chunk_size,
    )
    return loss


def loss_memory(num_rows, head, teacher_head, *, dtype, divergence, temperature, chunk_size):
    """Temporary bytes of the loss with both gradients over ``num_rows`` tokens: ``{"fused", "dense"}``.

    Both are compiled for the device in use; neither runs.
    """
    options = {"divergence": divergence, "temperature": temperature}
    losses = {
        "fused": lambda *arrays: fused_loss(*arrays, **options, chunk_size=chunk_size),
        "dense": lambda *arrays: dense_loss(*arrays, **options),
    }
    hidden, teacher_hidden = (jax.ShapeDtypeStruct((num_rows, x.shape[1]), dtype) for x in (head, teacher_head))
    labels = jax.ShapeDtypeStruct((num_rows,), jnp.int32)
    sizes = {}
    for name, loss in losses.items():
        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        compiled = step.lower(hidden, head, teacher_hidden, teacher_head, labels).compile()
        analysis: Any = compiled.memory_analysis()
        sizes[name] = analysis.temp_size_in_bytes
    return sizes
