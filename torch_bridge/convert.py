"""Arrays across DLPack: JAX to PyTorch and back, on CPU and CUDA, every dtype both sides know (bfloat16 included).

The ``to_`` functions copy, because JAX counts on an array never changing while PyTorch writes in place, and shared
memory would let it write into a JAX array. The ``borrow_as_`` functions share the memory and leave that care to the
caller. Neither works on tracers: call them outside ``jax.jit``.
"""

import jax
import jax.numpy as jnp
import torch

ALIGNMENT = 16  # bytes: XLA's kernels on a GPU count on it (on a CPU JAX copies what is misaligned for it)


def to_torch(array: jax.Array) -> torch.Tensor:
    """A tensor with the array's values, dtype and device, in memory of its own.

    Returns once the copy is made, so the array may be deleted or donated at once.

    Raises:
      TypeError: `array` is no concrete JAX array, or PyTorch has no such dtype (int4, PRNG keys).
      ValueError: `array` lies on several devices or on one that PyTorch cannot reach.
    """
    tensor = borrow_as_torch(array).clone()
    if tensor.is_cuda:  # JAX may reuse the borrowed memory as soon as it is let go, without asking torch's stream
        torch.cuda.current_stream(tensor.device).synchronize()
    return tensor


def to_jax(tensor: torch.Tensor) -> jax.Array:
    """An array with the tensor's values, dtype and device, in memory of its own.

    Returns once the copy is made, so the tensor may be changed or freed at once.

    Raises:
      TypeError: `tensor` is no strided tensor or requires grad, or JAX would narrow its dtype (64-bit without x64).
      ValueError: `tensor` is not contiguous, or lies on a device that JAX cannot reach.
    """
    return jnp.array(borrow_as_jax(tensor), copy=True).block_until_ready()


def borrow_as_torch(array: jax.Array) -> torch.Tensor:
    """The array's own memory as a tensor, nothing copied. Errors as in `to_torch`.

    Reading is safe. Never write to the tensor (no ``add_``, no ``out=``): JAX takes every array for constant. Never
    donate the array to a jitted function while the tensor lives. On CUDA let the tensor go only once the kernels that
    read it have run: JAX may reuse the memory right after.
    """
    if isinstance(array, jax.core.Tracer):
        raise TypeError(f"`array` is traced ({array.aval}): hand arrays to PyTorch outside jax.jit and jax.grad")
    if not isinstance(array, jax.Array):
        raise TypeError(f"`array` must be a JAX array, got {type(array).__name__}: wrap it in jnp.asarray")
    if len(array.devices()) != 1:
        raise ValueError(f"`array` lies on {len(array.devices())} devices: gather it on one with jax.device_put")
    (device,) = array.devices()
    if device.platform not in ("cpu", "gpu") or (device.platform == "gpu" and not torch.cuda.is_available()):
        raise ValueError(f"`array` lies on {device}, which this PyTorch cannot reach: jax.device_put it on a CPU")
    try:
        return torch.from_dlpack(array)
    except (BufferError, RuntimeError) as error:
        raise TypeError(f"`array` has dtype {array.dtype}, which DLPack cannot carry to PyTorch: {error}") from error


def borrow_as_jax(tensor: torch.Tensor) -> jax.Array:
    """The tensor's own memory as an array, nothing copied (unless it is misaligned). Errors as in `to_jax`.

    JAX never writes to it. Do not change the tensor in place (no ``add_``, no ``optimizer.step()`` on a parameter)
    before every computation on the array is done: JAX runs them asynchronously.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"`tensor` must be a torch.Tensor, got {type(tensor).__name__}")
    kind = f"{tensor.dtype} tensor of shape {tuple(tensor.shape)} on {tensor.device}"
    if tensor.requires_grad:
        raise TypeError(f"`tensor`, a {kind}, requires grad, which would be lost: pass tensor.detach()")
    if tensor.layout != torch.strided or tensor.is_conj():
        raise TypeError(f"`tensor`, a {kind}, is sparse or conjugated: pass tensor.to_dense() or tensor.resolve_conj()")
    if tensor.device.type not in ("cpu", "cuda"):
        raise ValueError(f"`tensor`, a {kind}, cannot cross to JAX: move it with tensor.cpu() or tensor.cuda()")
    if tensor.is_cuda and not _has_cuda():
        raise ValueError(f"`tensor`, a {kind}, cannot cross, for this JAX has no CUDA device: use tensor.cpu()")
    if not tensor.is_contiguous():
        raise ValueError(f"`tensor`, a {kind}, has strides {tensor.stride()}: pass tensor.contiguous()")
    if tensor.data_ptr() % ALIGNMENT:  # a slice of a tensor, say: XLA takes it in and refuses to compute with it
        tensor = tensor.clone()
    array = jax.dlpack.from_dlpack(tensor)
    if array.dtype.itemsize != tensor.element_size():
        raise TypeError(
            f"`tensor`, a {kind}, would be narrowed to {array.dtype}: convert it yourself (tensor.to(...)) or set"
            " jax_enable_x64"
        )
    return array


def obstacle_to_cuda() -> str | None:
    """Why the two cannot share a CUDA GPU, and what to do; None if they can."""
    if not torch.cuda.is_available():
        return "this PyTorch sees no CUDA GPU: install one that does"
    if jax.default_backend() != "gpu":
        return f"JAX computes on {jax.default_backend()!r}: install jax[cuda13]"
    return None


def _has_cuda() -> bool:
    try:
        return bool(jax.devices("cuda"))
    except RuntimeError:
        return False
