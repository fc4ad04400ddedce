"""One loss on one batch in both libraries, and how far apart the results are."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import torch

from torch_bridge.autograd import torch_loss

Tensors = dict[str, torch.Tensor]

# Relative L2 errors of gradients: the rounding of the results themselves with a margin. A bfloat16 gradient whose every
# entry is rounded perfectly has an error of 1.7e-3.
GRADIENT_BOUNDS = {"float32": 2e-5, "bfloat16": 5e-3, "float16": 2e-3}
LOSS_BOUND = 1e-5  # of |error| / max(|loss|, 0.1): losses are float32 whatever the inputs are


class Comparison(NamedTuple):
    """A loss of jaxkd, its dense twin in `torch_bridge.reference`, and the tensors that both are given."""

    family: str  # the table it belongs to, such as "preference"
    loss: str  # its public name, with its parameters where they are not the defaults
    setting: str  # what is special about the case, in a few words
    inputs: Tensors  # differentiated, in the dtype of the case
    jax_loss: Callable[[dict[str, Any]], tuple[Any, Any]]  # inputs as jax arrays -> (loss, metrics)
    torch_loss: Callable[[Tensors], torch.Tensor]  # inputs -> loss

    @property
    def dtype(self) -> str:
        return str(next(iter(self.inputs.values())).dtype).removeprefix("torch.")


@dataclass
class Outcome:
    """What a comparison gave: errors of "loss" and of the gradients, or the exception that stopped it."""

    comparison: Comparison
    errors: dict[str, float] = field(default_factory=dict)
    exception: str | None = None

    @property
    def bound(self) -> float:
        return GRADIENT_BOUNDS[self.comparison.dtype]

    @property
    def passed(self) -> bool:
        bounds = {name: LOSS_BOUND if name == "loss" else self.bound for name in self.errors}
        return bool(self.errors) and all(self.errors[name] <= bound for name, bound in bounds.items())

    @property
    def worst_gradient(self) -> float:
        return max((error for name, error in self.errors.items() if name != "loss"), default=math.nan)


def outcome(comparison: Comparison) -> Outcome:
    try:
        return Outcome(comparison, compare(comparison))
    except Exception as error:  # fails its row, not the table
        return Outcome(comparison, exception=f"{type(error).__name__}: {error}")


def compare(comparison: Comparison) -> dict[str, float]:
    """The errors of jaxkd's loss and of its gradients against the dense loss in float64."""
    exact = loss_and_gradients(
        comparison.torch_loss, {name: x.to(torch.float64) for name, x in comparison.inputs.items()}
    )
    loss = torch_loss(comparison.jax_loss)
    with jax.default_matmul_precision("highest"):  # float32 products are TF32 on a GPU otherwise
        results = loss_and_gradients(lambda inputs: loss(inputs)[0], comparison.inputs)
    return errors(results, exact)


def loss_and_gradients(loss: Callable[[Tensors], torch.Tensor], inputs: Tensors) -> Tensors:
    """The value of "loss", and by their names the gradients of the inputs."""
    tensors = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    value = loss(tensors)
    gradients = torch.autograd.grad(value, list(tensors.values()))
    return {"loss": value.detach(), **dict(zip(tensors, gradients, strict=True))}


def errors(results: Tensors, exact: Tensors) -> dict[str, float]:
    """Of "loss", relative to its size or 0.1; of each gradient, relative in L2."""
    values = {}
    for name, truth in exact.items():
        if name == "loss":
            same = bool(results[name] == truth)  # inf included
            values[name] = 0.0 if same else float(abs(results[name].double() - truth)) / max(abs(float(truth)), 0.1)
        else:
            values[name] = float((results[name].double() - truth).norm() / truth.norm())
    return values
