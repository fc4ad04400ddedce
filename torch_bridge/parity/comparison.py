"""One loss on one batch in both libraries, how far apart the results are, and the verdict on that."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import torch

from jaxkd.kernels.dispatch import CannotRun
from torch_bridge.autograd import torch_loss
from torch_bridge.convert import to_jax

Tensors = dict[str, torch.Tensor]
TorchLoss = Callable[[Tensors], torch.Tensor]

# Relative L2 errors of gradients: the rounding of the results themselves with a margin. A bfloat16 gradient whose every
# entry is rounded perfectly has an error of 1.7e-3.
GRADIENT_BOUNDS = {"float32": 2e-5, "bfloat16": 5e-3, "float16": 2e-3}
LOSS_BOUND = 1e-5  # of |error| / max(|loss|, 0.1): losses are float32 whatever the inputs are


class Comparison(NamedTuple):
    """A loss of jaxkd, its dense twin in `torch_bridge.reference`, and the tensors that both are given.

    Both losses take one dict of ``inputs`` and ``given`` together; the truth is the twin with all of them in float64.
    """

    family: str  # such as "preference"
    loss: str  # its public name, with its parameters where they are not the defaults
    setting: str  # what is special about the case, in a few words
    inputs: Tensors  # differentiated, in the dtype of the case
    jax_loss: Callable[[dict[str, Any]], tuple[Any, Any]]  # arrays -> (loss, metrics)
    torch_loss: TorchLoss
    given: Mapping[str, torch.Tensor] = {}  # what is not differentiated
    peers: Mapping[str, TorchLoss] = {}  # other PyTorch losses to show beside it, in the dtype of the case
    gradient_bound: float | None = None  # None: that of the dtype

    @property
    def dtype(self) -> str:
        return str(next(iter(self.inputs.values())).dtype).removeprefix("torch.")

    def __str__(self) -> str:
        return f"{self.loss}, {self.setting}, {self.dtype}"


@dataclass
class Result:
    """What a comparison gave. `errors` and `bounds` have "loss" and the differentiated tensors as keys."""

    comparison: Comparison
    errors: dict[str, float] = field(default_factory=dict)
    peers: dict[str, float] = field(default_factory=dict)  # their worst gradient errors, NaN where they do not run
    exception: str | None = None
    refused: bool = False  # the named implementation is not for such a call, and says so

    @property
    def bounds(self) -> dict[str, float]:
        gradient = self.comparison.gradient_bound or GRADIENT_BOUNDS[self.comparison.dtype]
        return {name: LOSS_BOUND if name == "loss" else gradient for name in self.errors}

    @property
    def passed(self) -> bool:
        return bool(self.errors) and all(self.errors[name] <= bound for name, bound in self.bounds.items())

    @property
    def verdict(self) -> str:
        return "refused" if self.refused else "pass" if self.passed else "FAIL"

    @property
    def worst_gradient(self) -> float:
        return worst_gradient(self.errors)


def compare(comparison: Comparison) -> Result:
    """Runs a comparison in jaxkd, in float64 and in whatever is shown beside it."""
    result = Result(comparison)
    loss = torch_loss(comparison.jax_loss)
    try:
        exact = loss_and_gradients(comparison.torch_loss, in_float64(comparison.inputs), in_float64(comparison.given))
        with jax.default_matmul_precision("highest"):  # float32 products are TF32 on a GPU otherwise
            found = loss_and_gradients(lambda tensors: loss(tensors)[0], comparison.inputs, comparison.given)
        result.errors = errors(found, exact)
    except Exception as error:  # a kernel that does not compile fails its row, not the table
        result.exception = f"{type(error).__name__}: {error}"
        result.refused = isinstance(error, CannotRun)
        return result
    for name, peer in comparison.peers.items():
        try:
            found = loss_and_gradients(peer, comparison.inputs, comparison.given)
        except Exception:  # no verdict on us
            result.peers[name] = math.nan
        else:
            result.peers[name] = worst_gradient(errors(found, exact))
    return result


def loss_and_gradients(loss: TorchLoss, inputs: Tensors, given: Mapping[str, torch.Tensor] = {}) -> Tensors:
    """The value of "loss", and by their names the gradients of the inputs."""
    tensors = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    value = loss(tensors | dict(given))
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


def worst_gradient(errors: dict[str, float]) -> float:
    """The largest error of a gradient, NaN where one is."""
    gradients = [error for name, error in errors.items() if name != "loss"]
    return math.nan if not gradients or any(map(math.isnan, gradients)) else max(gradients)


def in_float64(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    return {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()}


def in_dtype(fields: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The fields of a head, its tensors in this dtype."""
    return {name: x.to(dtype) if isinstance(x, torch.Tensor) else x for name, x in fields.items()}


def as_jax(tree: Any) -> Any:
    """A tree with its tensors as arrays on the same device, 64-bit integers in 32 bits."""

    def convert(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        return to_jax((x.to(torch.int32) if x.dtype == torch.int64 else x).contiguous())

    return jax.tree.map(convert, tree)
