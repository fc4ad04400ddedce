"""JAX and PyTorch side by side: arrays across DLPack, dense reference losses, jaxkd's losses in a PyTorch loop.

Rooms, arrows only downward: `parity` and `benchmark` (commands) -> `reference`, `teachers` -> `convert`, `autograd`.
"""

from importlib.util import find_spec

if find_spec("torch") is None:
    raise ModuleNotFoundError("torch_bridge needs PyTorch: pip install -e '.[torch]'", name="torch")

from torch_bridge import reference as reference
from torch_bridge.autograd import torch_loss as torch_loss
from torch_bridge.convert import borrow_as_jax as borrow_as_jax
from torch_bridge.convert import borrow_as_torch as borrow_as_torch
from torch_bridge.convert import to_jax as to_jax
from torch_bridge.convert import to_torch as to_torch
from torch_bridge.teachers import CacheError as CacheError
from torch_bridge.teachers import LiveTeacher as LiveTeacher
from torch_bridge.teachers import TeacherBatch as TeacherBatch
from torch_bridge.teachers import TeacherCache as TeacherCache
from torch_bridge.teachers import cache_teacher as cache_teacher
from torch_bridge.teachers import match_vocabularies as match_vocabularies
from torch_bridge.teachers import open_teacher_cache as open_teacher_cache

__all__ = [
    "CacheError",
    "LiveTeacher",
    "TeacherBatch",
    "TeacherCache",
    "borrow_as_jax",
    "borrow_as_torch",
    "cache_teacher",
    "match_vocabularies",
    "open_teacher_cache",
    "reference",
    "to_jax",
    "to_torch",
    "torch_loss",
]
