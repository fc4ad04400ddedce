"""Cross-entropy and the functions that give one number a row in both libraries, on data like a model's.

Each row of the latter has an upstream gradient of its own. These comparisons and those of `compare_divergences` take
an implementation; all others run in XLA.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
import torch
from torch.nn import functional

import jaxkd
from torch_bridge import reference
from torch_bridge.parity.comparison import Comparison, Tensors, as_jax, in_dtype
from torch_bridge.parity.distillation_cases import DIVERGENCES, Batch, Case, Shape, make_batch

B, T, CHUNK = 4, 17, 16  # 68 rows: five chunks, the last one ragged
RAGGED, ALIGNED = Shape(B * T, 48, 40, 509, 509), Shape(B * T, 48, 40, 1024, 1024)  # the Mosaic kernel has the latter
NARROWER = RAGGED._replace(teacher_vocabulary=500)
# The gradient of a divergence is formed from sums that were kept and logits that are multiplied again. Where the second
# product rounds otherwise, as XLA's may on a GPU, slopes no longer sum to what was kept: 2.2e-5 there, 4e-6 on a CPU.
FROM_KEPT_SUMS = {"float32": 5e-5}
NAN_STATES = "poisoned"  # of the rows, two in five, whose label does not count


def comparisons(device: str = "cpu", implementation: str | None = None) -> list[Comparison]:
    """Each in float32 and bfloat16."""
    return [
        case
        for dtype in ("float32", "bfloat16")
        for family in (_cross_entropy, _of_tokens, _divergences)
        for case in family(dtype, device, implementation)
    ]


def _cross_entropy(dtype: str, device: str, implementation: str | None) -> list[Comparison]:
    def case(
        setting: str,
        shape: Shape,
        mask: str = "none",
        head: str = "plain",
        frozen: tuple[str, ...] = (),
        truth: Callable[[Any, torch.Tensor], torch.Tensor] | None = None,
        **options: Any,
    ) -> Comparison:
        batch = make_batch(Case("", shape, dtype, mask=mask, head=head), device)
        student, _ = batch.tensors()
        numbers = {name: x for name, x in batch.student.items() if name not in student}
        inputs, fixed = ({k: x for k, x in student.items() if (k in frozen) == is_fixed} for is_fixed in (False, True))
        labels = batch.labels if batch.labels is not None else _every_label(shape).to(device)
        own = {name: batch.options[name] for name in ("weights", "normalizer") if name in batch.options}
        jax_labels, jax_fixed, jax_own = as_jax((labels, fixed, own))

        def of_jax(inputs: dict[str, Any]) -> Any:
            head = jaxkd.LinearLogits(**inputs, **jax_fixed, **numbers)
            how: dict[str, Any] = {"chunk_size": CHUNK, "implementation": implementation}
            return jaxkd.cross_entropy(head, jax_labels, **options, **jax_own, **how)

        def of_torch(inputs: Tensors) -> torch.Tensor:
            head = reference.LinearLogits(**inputs, **in_dtype(fixed, inputs["hidden"].dtype), **numbers)
            if truth is not None:
                return truth(head, labels)
            return reference.cross_entropy(head, labels, **options, **own)[0]

        return Comparison("cross-entropy", "cross_entropy", setting, inputs, of_jax, of_torch)

    smoothed = partial(functional.cross_entropy, label_smoothing=0.1)
    return [
        case("plain", ALIGNED),
        case("ignored rows", RAGGED, "ignored"),
        case("smoothing, NaN states", ALIGNED, NAN_STATES, label_smoothing=0.1),
        case("z-loss, weights", ALIGNED, "weighted", z_loss=1e-2),
        case("smoothing, z-loss, bias", RAGGED, "weighted", "bias", label_smoothing=0.1, z_loss=1e-2),
        case("smoothing, z-loss, softcap", ALIGNED, "ignored", "bias+softcap", label_smoothing=0.2, z_loss=1e-2),
        case("frozen head", ALIGNED, "ignored", frozen=("weight",), label_smoothing=0.1),
        case("torch's own", RAGGED, truth=lambda x, labels: functional.cross_entropy(_every(x), labels)),
        case("torch's own, smoothing", RAGGED, truth=lambda x, y: smoothed(_every(x), y), label_smoothing=0.1),
    ]


def _every_label(shape: Shape) -> torch.Tensor:
    return torch.randint(shape.vocabulary, (shape.rows,), generator=torch.Generator().manual_seed(4))


def _every(student: reference.LinearLogits) -> torch.Tensor:
    return student.rows(torch.ones(len(student.hidden), dtype=torch.bool, device=student.hidden.device))


Values = Callable[..., Any]  # of a library, a student and what else is given, to (...)


def _of_tokens(dtype: str, device: str, implementation: str | None) -> list[Comparison]:
    """Of a head with bias, scale and softcap; the first sequence has no row that counts."""
    cases = []
    for shape, of_labels, of_entropies in ((RAGGED, 1.0, 2.0), (ALIGNED, 0.7, 1.0)):
        batch = make_batch(Case("", shape, dtype, mask=NAN_STATES, head="bias+softcap"), device)
        assert batch.labels is not None
        labels = batch.labels.view(B, T)
        labels[0] = -100
        given = {"labels": labels, "mask": labels != -100}
        case = partial(_case, batch, given, implementation)
        cases += [
            case(name, f"V {shape.vocabulary}, tau {temperature:g}", partial(values, temperature=temperature))
            for name, values, temperature in (
                ("token_log_probs", _log_probs, of_labels),
                ("token_entropies", _entropies, of_entropies),
            )
        ]
    return [
        *cases,
        case("sequence_log_probs", "sum", _sequences),
        case("sequence_log_probs", "average, tau 2", partial(_sequences, average=True, temperature=2.0)),
    ]


def _log_probs(library: Any, student: Any, given: dict[str, Any], **options: Any) -> Any:
    return library.token_log_probs(student, given["labels"], **options)


def _sequences(library: Any, student: Any, given: dict[str, Any], **options: Any) -> Any:
    return library.sequence_log_probs(student, given["labels"], **options)


def _entropies(library: Any, student: Any, given: dict[str, Any], **options: Any) -> Any:
    return library.token_entropies(student, mask=given["mask"], **options)


def _divergences(dtype: str, device: str, implementation: str | None) -> list[Comparison]:
    def case(name: str, setting: str, shape: Shape, mask: str, **options: Any) -> Comparison:
        batch = make_batch(Case(name, shape, dtype, mask=mask), device)
        given = {"labels": batch.labels, "mask": (torch.arange(shape.rows) % 7 > 0).to(device)}

        jax_teacher, pair = as_jax(batch.teacher), DIVERGENCES[name]

        def values(library: Any, student: Any, given: dict[str, Any], **how: Any) -> Any:
            is_torch = library is reference
            teacher = in_dtype(batch.teacher, student.hidden.dtype) if is_torch else jax_teacher
            how |= options | {"divergence": pair.torch if is_torch else pair.jax, "mask": given["mask"]}
            return library.token_divergences(student, library.LinearLogits(**teacher), given["labels"], **how)

        loss = f"token_divergences({name})"
        return _case(batch, given, implementation, loss, setting, values, FROM_KEPT_SUMS.get(dtype))

    return [
        case("forward_kl", "mask", RAGGED, "none"),
        case("reverse_kl", "NaN states, tau 2", ALIGNED, NAN_STATES, temperature=2.0),
        case("jensen_shannon(0.5)", "mask and ignored", ALIGNED, "ignored"),
        case("jensen_shannon(0.1)", "tau 2", RAGGED, "none", temperature=2.0),
        case("hellinger", "mask and ignored", ALIGNED, "ignored"),
        case("alpha_divergence(0.3)", "narrower teacher", NARROWER, NAN_STATES, vocabulary="truncate"),
    ]


def _case(
    batch: Batch,
    given: dict[str, Any],
    implementation: str | None,
    loss: str,
    setting: str,
    values: Values,
    gradient_bound: float | None = None,
) -> Comparison:
    """The sum of the rows' values, each times a number of its own."""
    student, _ = batch.tensors()
    numbers = {name: x for name, x in batch.student.items() if name not in student}
    jax_given = as_jax(given)
    upstream = torch.randn(B * T, generator=torch.Generator().manual_seed(2)).to(student["hidden"].device)
    jax_upstream = as_jax(upstream)
    rows = given["mask"].shape

    def of_jax(inputs: dict[str, Any]) -> Any:
        hidden = jnp.reshape(inputs["hidden"], (*rows, -1))
        head = jaxkd.LinearLogits(**inputs | {"hidden": hidden}, **numbers)
        found = values(jaxkd, head, jax_given, chunk_size=CHUNK, implementation=implementation)
        return jnp.sum(found.ravel() * jax_upstream[: found.size]), {}

    def of_torch(inputs: Tensors) -> torch.Tensor:
        hidden = inputs["hidden"].view(*rows, -1)
        head = reference.LinearLogits(**inputs | {"hidden": hidden}, **numbers)
        found = values(reference, head, given).flatten()
        return (found * upstream[: len(found)]).sum()

    return Comparison("one number a row", loss, setting, student, of_jax, of_torch, gradient_bound=gradient_bound)
