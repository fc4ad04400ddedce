"""Any jaxkd loss in a PyTorch training loop: gradients formed by JAX in the forward pass, applied by torch.autograd."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from torch_bridge.convert import borrow_as_jax, borrow_as_torch, to_torch


def torch_loss(function: Callable[..., Any], **options: Any) -> Callable[..., tuple[torch.Tensor, Any]]:
    """A jaxkd loss as a function of tensors, differentiable by PyTorch.

        loss_fn = torch_loss(jaxkd.fused_linear_jsd, beta=0.5, temperature=2.0)
        loss, metrics = loss_fn(student_hidden, student_weight, teacher_hidden, teacher_weight, labels)
        loss.backward()

    The loss is compiled once for each combination of shapes, dtypes, options and tensors that require grad. Gradients
    are formed for those tensors alone, during the call; ``backward`` multiplies them by the upstream gradient. Under
    ``torch.no_grad()``, or where no tensor requires grad, only the loss is computed. There is no second derivative:
    ``create_graph=True`` raises an error.

    Args:
      function: takes arrays, nested in pytrees or not, and returns ``(loss, metrics)``: a scalar and a pytree of
        arrays. Any loss of jaxkd, or a function of your own around it.
      **options: keyword arguments for every call, such as ``beta`` or ``temperature``.

    Returns:
      A function of the same arguments, more options included, that returns ``loss`` and ``metrics`` as tensors.
      Tensors and arrays are traced; everything else, Python numbers too, is a constant of the compiled loss, so hand
      over a number that changes every step as a tensor. Tensors are read in place, on CPU or CUDA; only those that are
      not contiguous or not aligned are copied, and int64 ones are cast to int32 (saturating) unless JAX runs with x64.
      The call returns when JAX is done, so the tensors may be changed right after.

    Raises:
      TypeError, ValueError: a tensor cannot cross to JAX (see `borrow_as_jax`), or what `function` raises.
    """

    def loss_fn(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        leaves, tree = jax.tree.flatten((args, {**options, **kwargs}))
        traced = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor | jax.Array | np.ndarray)}
        constants = tuple(None if i in traced else leaf for i, leaf in enumerate(leaves))
        wanted = {
            i: leaf
            for i, leaf in traced.items()
            if torch.is_grad_enabled() and isinstance(leaf, torch.Tensor) and leaf.requires_grad
        }
        arrays = {i: _readable(leaf) if isinstance(leaf, torch.Tensor) else leaf for i, leaf in traced.items()}
        results = _evaluate(function, tree, constants, tuple(wanted), arrays)
        loss, metrics, gradients = jax.block_until_ready(results)
        loss, metrics = jax.tree.map(to_torch, (loss, metrics))
        if wanted:
            loss = _KnownGradients.apply(loss, [borrow_as_torch(g) for g in gradients], *wanted.values())
        return loss, metrics

    return loss_fn


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _evaluate(function, tree, constants, wanted, arrays):
    """The loss, its metrics and the gradients for the leaves numbered in `wanted`."""

    def loss_of(chosen):
        merged = arrays | chosen
        args, kwargs = jax.tree.unflatten(tree, [merged.get(i, constant) for i, constant in enumerate(constants)])
        return function(*args, **kwargs)

    if not wanted:
        return *loss_of({}), []
    (loss, metrics), gradients = jax.value_and_grad(loss_of, has_aux=True)({i: arrays[i] for i in wanted})
    return loss, metrics, [gradients[i] for i in wanted]


class _KnownGradients(torch.autograd.Function):
    """A loss whose gradients for `tensors` have been formed already."""

    @staticmethod
    def forward(ctx, loss, gradients, *tensors):
        ctx.save_for_backward(*gradients)
        return loss.clone()

    @staticmethod
    def backward(ctx, upstream):
        if torch.is_grad_enabled():  # under create_graph=True, where these gradients would pass for constants
            raise RuntimeError("a jaxkd loss has no second derivative in PyTorch: leave out create_graph=True")
        products = [gradient * upstream for gradient in ctx.saved_tensors]
        if upstream.is_cuda:  # the gradients lie in JAX's memory, which must not be let go while it is being read
            torch.cuda.current_stream(upstream.device).synchronize()
        return None, None, *products


def _readable(tensor: torch.Tensor) -> jax.Array:
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.int64 and jnp.result_type(int) == jnp.int32:
        limits = torch.iinfo(torch.int32)
        tensor = tensor.clamp(limits.min, limits.max).to(torch.int32)
    return borrow_as_jax(tensor)
