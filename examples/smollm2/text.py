"""Text to windows of tokens, the held-out part, and the order in which training visits the rest."""

import hashlib
import sysconfig
from pathlib import Path

import numpy as np


def read_text(paths):
    """The files one after the other, or Python's own documentation (``pydoc_data.topics``) when there are none.

    A paragraph that occurs again is dropped (the topics quote one another at length): what is held out must not be
    trained on through a copy.
    """
    if paths:
        text = "\n\n".join(path.read_text(encoding="utf-8") for path in paths)
    else:
        from pydoc_data.topics import topics

        text = "\n\n".join(topics[name] for name in sorted(topics))
    return "\n\n".join(dict.fromkeys(text.split("\n\n")))


def standard_library():
    """The sources of Python's standard library, but for its tests: ten megabytes that everyone has."""
    root = Path(sysconfig.get_paths()["stdlib"])
    others = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    return sorted(x for x in root.rglob("*.py") if others.isdisjoint(x.relative_to(root).parts))


def windows_of(tokens, length):
    """Cut a list of tokens into rows of ``length + 1``, none shared: row[:-1] is read, row[1:] are its labels."""
    count = len(tokens) // (length + 1)
    return np.asarray(tokens[: count * (length + 1)], np.int32).reshape(count, length + 1)


def split(windows, held_out, train, seed):
    """Hold out ``held_out`` evenly spaced windows; return them and at most ``train`` of the others, shuffled."""
    chosen = np.linspace(0, len(windows) - 1, held_out).round().astype(int)
    others = np.delete(windows, chosen, axis=0)
    return windows[chosen], np.random.default_rng(seed).permutation(others)[:train]


def batch_indices(seed, step, batch_size, num_windows):
    """The windows of a step, a function of (seed, step) alone; every window comes once an epoch, in a new order."""
    visits = np.arange(step * batch_size, (step + 1) * batch_size)
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(num_windows) for epoch in visits // num_windows}
    return np.array([orders[visit // num_windows][visit % num_windows] for visit in visits])


def fingerprint(*parts):
    """SHA-256 over byte strings and arrays, in hex."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()
