"""Losses of whole rows of logits and of hidden states in both libraries, on data like a model's."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import torch

import jaxkd
from torch_bridge import reference
from torch_bridge.parity.comparison import Comparison, Tensors, as_jax, in_dtype
from torch_bridge.parity.distillation_cases import Case, Shape, make_batch

ROWS, HIDDEN, VOCABULARY, EMBEDDING, CHUNK = 68, 48, 509, 24, 16  # five chunks, the last one ragged
SAME, OTHER = Shape(ROWS, HIDDEN, 40, VOCABULARY, VOCABULARY), Shape(ROWS, HIDDEN, 40, VOCABULARY, 521)
# Three rows in five have a label that counts; the states of the others are NaN.
WEIGHTED, POISONED = "weighted", "poisoned"


def comparisons(device: str = "cpu") -> list[Comparison]:
    """Every loss in float32 and bfloat16, with ignored rows, and weights or NaN states where they are ignored."""
    return [
        case
        for dtype in ("float32", "bfloat16")
        for family in (_distillation, _hidden, _own)
        for case in family(dtype, device)
    ]


def _distillation(dtype: str, device: str) -> list[Comparison]:
    generator = torch.Generator().manual_seed(1)
    tokens, others = (
        (torch.randn(width, EMBEDDING, generator=generator) / EMBEDDING**0.5).to(device)
        for width in (OTHER.teacher_vocabulary, VOCABULARY)
    )
    jax_tables = as_jax((tokens, others))

    def case(loss: str, setting: str, make: Callable[[Any, Any, Any], Any], shape: Shape, mask: str) -> Comparison:
        batch = make_batch(Case(loss, shape, dtype, mask=mask, temperature=2.0), device)
        teacher, labels, options = as_jax((batch.teacher, batch.labels, batch.options))
        divergence, dense_divergence = make(jaxkd, *jax_tables), make(reference, tokens, others)

        def of_jax(inputs: dict[str, Any]) -> Any:
            models = jaxkd.LinearLogits(**inputs), jaxkd.LinearLogits(**teacher)
            return jaxkd.distillation_loss(*models, labels, divergence=divergence, chunk_size=CHUNK, **options)

        def of_torch(inputs: Tensors) -> torch.Tensor:
            fixed = reference.LinearLogits(**in_dtype(batch.teacher, inputs["hidden"].dtype))
            models = reference.LinearLogits(**inputs), fixed
            return reference.distillation_loss(*models, batch.labels, divergence=dense_divergence, **batch.options)[0]

        return Comparison("distillation", loss, setting, batch.student, of_jax, of_torch)

    return [
        case("cosine_distance", "weights", lambda library, e, _: library.cosine_distance, SAME, WEIGHTED),
        case("cosine_distance", "NaN states", lambda library, e, _: library.cosine_distance, OTHER, POISONED),
        case("mse", "weights", lambda library, e, _: library.mse, SAME, WEIGHTED),
        case("mse", "NaN states", lambda library, e, _: library.mse, OTHER, POISONED),
        case("earth_mover", "weights", lambda library, e, _: library.earth_mover, SAME, WEIGHTED),
        case("earth_mover", "other tokenizer", lambda library, e, _: library.earth_mover, OTHER, POISONED),
        case("kernel_distance", "identity", lambda library, e, _: library.kernel_distance(), OTHER, WEIGHTED),
        case("kernel_distance", "linear", lambda library, e, _: library.kernel_distance(e), OTHER, POISONED),
        case("kernel_distance", "cubic", lambda library, e, _: library.kernel_distance(e, degree=3), SAME, WEIGHTED),
        case("sinkhorn", "weights", lambda library, e, _: library.sinkhorn(e), SAME, WEIGHTED),
        case("sinkhorn", "other tokenizer", _short_sinkhorn, OTHER, POISONED),
    ]


def _short_sinkhorn(library: ModuleType, teacher_tokens: Any, student_tokens: Any) -> Any:
    return library.sinkhorn(teacher_tokens, student_tokens, top=20, epsilon=0.2, iterations=10)


def _hidden(dtype: str, device: str) -> list[Comparison]:
    batch = make_batch(Case("", Shape(ROWS, HIDDEN, 40, 40, 1), dtype, mask=POISONED), device)
    student, projection, teacher = batch.student["hidden"], batch.student["weight"], batch.teacher["hidden"]
    weights = (2 * torch.rand(ROWS, generator=torch.Generator().manual_seed(3))).to(device)
    jax_teacher, jax_labels, jax_weights = as_jax((teacher, batch.labels, weights))

    def case(name: str, setting: str, inputs: Tensors, use_weights: bool) -> Comparison:
        def of_jax(inputs: dict[str, Any]) -> Any:
            states = inputs["student_hidden"], jax_teacher[:, : _width(inputs)]
            options = {"weights": jax_weights if use_weights else None, "chunk_size": CHUNK}
            return getattr(jaxkd, name)(*states, jax_labels, projection=inputs.get("projection"), **options)

        def of_torch(inputs: Tensors) -> torch.Tensor:
            states = inputs["student_hidden"], teacher[:, : _width(inputs)].to(inputs["student_hidden"])
            options = {"weights": weights if use_weights else None}
            return getattr(reference, name)(*states, batch.labels, projection=inputs.get("projection"), **options)[0]

        return Comparison("hidden states", name, setting, inputs, of_jax, of_torch)

    projected = {"student_hidden": student, "projection": projection}
    same = {"student_hidden": student[:, :40].contiguous()}
    return [
        case(name, setting, inputs, use_weights)
        for name in ("hidden_cosine", "hidden_mse")
        for setting, inputs, use_weights in (("NaN states", same, False), ("projection, weights", projected, True))
    ]


def _own(dtype: str, device: str) -> list[Comparison]:
    """Focal loss with a teacher's confidence in the label as a factor: its mean, and its rows' squares."""
    batch = make_batch(Case("", OTHER, dtype, mask=WEIGHTED), device)
    teacher, labels = as_jax(batch.teacher), as_jax(batch.labels)
    options = {name: batch.options[name] for name in ("weights", "normalizer")}
    jax_options = as_jax(options)

    def of_jax(inputs: dict[str, Any], name: str, **options: Any) -> Any:
        per_row, shared = {"teacher": jaxkd.LinearLogits(**teacher)}, jnp.asarray(2.0)
        options |= {"per_row": per_row, "shared": shared, "chunk_size": CHUNK}
        return getattr(jaxkd, name)(_focal, jaxkd.LinearLogits(**inputs), labels, **options)

    def focal(logits: torch.Tensor, labels: Any, teacher: torch.Tensor, gamma: float) -> torch.Tensor:
        q, p = (z.softmax(-1).gather(-1, labels[:, None])[:, 0] for z in (logits, teacher))
        return -p * (1 - q) ** gamma * q.log()

    def of_torch(inputs: Tensors, name: str, **options: Any) -> Any:
        fixed = reference.LinearLogits(**in_dtype(batch.teacher, inputs["hidden"].dtype))
        student = reference.LinearLogits(**inputs)
        return getattr(reference, name)(focal, student, batch.labels, per_row=fixed, shared=2.0, **options)

    def case(name: str, of_jax: Callable[..., Any], of_torch: Callable[..., Any]) -> Comparison:
        return Comparison("distillation", name, "one's own: focal", batch.student, of_jax, of_torch)

    return [
        case(
            "chunked_loss",
            lambda inputs: of_jax(inputs, "chunked_loss", **jax_options),
            lambda inputs: of_torch(inputs, "chunked_loss", **options)[0],
        ),
        case(
            "chunked_rows",
            lambda inputs: (jnp.sum(of_jax(inputs, "chunked_rows") ** 2), {}),
            lambda inputs: of_torch(inputs, "chunked_rows").square().sum(),
        ),
    ]


def _focal(logits: jax.Array, labels: jax.Array, per_row: dict[str, jax.Array], gamma: jax.Array) -> jax.Array:
    log_q, log_p = (
        jnp.take_along_axis(jax.nn.log_softmax(z), labels[:, None], axis=1)[:, 0] for z in (logits, per_row["teacher"])
    )
    return -jnp.exp(log_p) * (-jnp.expm1(log_q)) ** gamma * log_q


def _width(inputs: dict[str, Any]) -> int:
    return inputs["projection"].shape[0] if "projection" in inputs else inputs["student_hidden"].shape[1]
