"""Programs that run once or twice, as tests have them: what XLA's optimisation costs is never earned back."""

from typing import Any

import jax

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""``jax.jit(..., compiler_options=QUICK)``"""


def at_once(calls: dict[str, Any]) -> dict[str, Any]:
    """What each function without arguments returns, by one program."""
    return jax.device_get(jax.jit(lambda: {k: call() for k, call in calls.items()}, compiler_options=QUICK)())
