"""JAX and PyTorch side by side: arrays across DLPack, dense reference losses, jaxkd's losses in a PyTorch loop."""

from torch_bridge import reference as reference
from torch_bridge.autograd import torch_loss as torch_loss
from torch_bridge.convert import borrow_as_jax as borrow_as_jax
from torch_bridge.convert import borrow_as_torch as borrow_as_torch
from torch_bridge.convert import to_jax as to_jax
from torch_bridge.convert import to_torch as to_torch

__all__ = ["borrow_as_jax", "borrow_as_torch", "reference", "to_jax", "to_torch", "torch_loss"]
