"""The same student, trained in PyTorch on the dense loss and with jaxkd's fused loss in both frameworks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import jaxkd
from torch_bridge import reference, to_jax, torch_loss

STEPS, ROWS, VOCABULARY, WIDTH, TEACHER_WIDTH = 30, 40, 203, 16, 24
LEARNING_RATE = 0.02
LOSS = {"temperature": 2.0, "soft_weight": 4.0, "hard_weight": 0.5}
BETA = 0.3


@pytest.fixture(scope="module")
def problem():
    """A teacher's states and labels for each step, and the student's first parameters."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    teacher_embedding = 2 * normal(VOCABULARY, TEACHER_WIDTH)
    teacher_head = normal(VOCABULARY, TEACHER_WIDTH) / TEACHER_WIDTH**0.5
    tokens = torch.randint(VOCABULARY, (STEPS, ROWS), generator=generator)
    labels = (teacher_embedding @ teacher_head.T).argmax(-1)[tokens]
    labels[:, ::7] = -100
    student = {
        "embedding": normal(VOCABULARY, WIDTH),
        "mix": normal(WIDTH, WIDTH) / WIDTH**0.5,
        "head": normal(VOCABULARY, WIDTH) / WIDTH**0.5,
        "bias": torch.zeros(VOCABULARY),
    }
    return tokens, labels, teacher_embedding[tokens], teacher_head, student


def train_in_torch(problem, loss_fn):
    tokens, labels, teacher_hidden, teacher_head, start = problem
    student = {name: x.clone().requires_grad_() for name, x in start.items()}
    optimizer = torch.optim.AdamW(student.values(), lr=LEARNING_RATE, weight_decay=0.01)
    losses = []
    for step in range(STEPS):
        hidden = torch.tanh(student["embedding"][tokens[step]] @ student["mix"])
        loss = loss_fn(hidden, student["head"], student["bias"], teacher_hidden[step], teacher_head, labels[step])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return np.array(losses)


def train_in_jax(problem):
    *data, start = problem
    tokens, labels, teacher_hidden, teacher_head = (
        to_jax(x if x.is_floating_point() else x.to(torch.int32)) for x in data
    )
    optimizer = optax.adamw(LEARNING_RATE, weight_decay=0.01)

    def loss_of(student, tokens, labels, teacher_hidden):
        hidden = jnp.tanh(student["embedding"][tokens] @ student["mix"])
        return jaxkd.fused_linear_jsd(
            hidden,
            student["head"],
            teacher_hidden,
            teacher_head,
            labels,
            student_bias=student["bias"],
            beta=BETA,
            chunk_size=16,
            **LOSS,
        )

    def step(carry, batch):
        student, state = carry
        (loss, _), gradients = jax.value_and_grad(loss_of, has_aux=True)(student, *batch)
        updates, state = optimizer.update(gradients, state, student)
        return (optax.apply_updates(student, updates), state), loss

    student = {name: to_jax(x) for name, x in start.items()}
    _, losses = jax.jit(lambda carry, data: jax.lax.scan(step, carry, data))(
        (student, optimizer.init(student)), (tokens, labels, teacher_hidden)
    )
    return np.array(losses)


def dense_loss(hidden, head, bias, teacher_hidden, teacher_head, labels):
    return reference.distillation_loss(
        reference.LinearLogits(hidden, head, bias),
        reference.LinearLogits(teacher_hidden, teacher_head),
        labels,
        divergence=reference.jensen_shannon(BETA),
        **LOSS,
    )[0]


@pytest.fixture(scope="module")
def dense_curve(problem):
    losses = train_in_torch(problem, dense_loss)
    assert losses[-1] < 0.8 * losses[0], losses  # there is something to agree on
    return losses


def test_optax_on_the_fused_loss_follows_torch_on_the_dense_loss(problem, dense_curve):
    np.testing.assert_allclose(train_in_jax(problem), dense_curve, rtol=1e-3)


def test_torch_on_the_fused_loss_follows_torch_on_the_dense_loss(problem, dense_curve):
    fused = torch_loss(jaxkd.fused_linear_jsd, beta=BETA, chunk_size=16, **LOSS)

    def fused_loss(hidden, head, bias, teacher_hidden, teacher_head, labels):
        return fused(hidden, head, teacher_hidden, teacher_head, labels, student_bias=bias)[0]

    np.testing.assert_allclose(train_in_torch(problem, fused_loss), dense_curve, rtol=1e-3)
