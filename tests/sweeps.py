"""Parameters of tests of which only some are run unless slow tests are asked for."""

import pytest


def all_but(slow, values):
    """The values as parameters, those in ``slow`` marked; a tuple is one value for each argument."""
    return [_marked(x) if x in slow else x for x in values]


def only(fast, values):
    """The values as parameters, those that are not in ``fast`` marked slow."""
    return [x if x in fast else _marked(x) for x in values]


def _marked(value):
    return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)
