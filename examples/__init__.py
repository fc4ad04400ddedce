"""Runnable examples: ``python -m examples.NAME``."""

import sys

# What brings a package that an example imports.
NEEDED = dict.fromkeys(("flax", "optax"), "-e '.[flax]'") | dict.fromkeys(("qwix", "tunix"), "-e '.[tunix]'")
NEEDED |= dict.fromkeys(("orbax", "rich", "torch", "transformers"), "-e '.[examples]'") | {"matplotlib": "matplotlib"}


def _name_what_to_install(kind, error, traceback):
    """A program without what it needs ends in the command that installs it."""
    name = (getattr(error, "name", None) or "").split(".")[0]
    if issubclass(kind, ModuleNotFoundError) and name in NEEDED:
        sys.exit(f"error: {name} is not installed: pip install {NEEDED[name]}")
    sys.__excepthook__(kind, error, traceback)


if "-m" in sys.orig_argv:  # run, not imported
    sys.excepthook = _name_what_to_install
