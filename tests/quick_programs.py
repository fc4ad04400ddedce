"""Programs that run once or twice, as tests have them: what XLA's optimisation costs is never earned back."""

from typing import Any

import jax

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""``jax.jit(..., compiler_options=QUICK)``"""


class Traced:
    """A function that counts how often it is traced, under `jax.jit` once a compilation."""

    def __init__(self, function):
        self.function, self.count = function, 0

    def __call__(self, *arguments: Any) -> Any:
        self.count += 1
        return self.function(*arguments)


def at_once(calls: dict[str, Any]) -> dict[str, Any]:
    """What each function without arguments returns, by one program."""
    return jax.device_get(jax.jit(lambda: {k: call() for k, call in calls.items()}, compiler_options=QUICK)())
