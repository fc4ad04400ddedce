"""Comparisons as parameters of a test: every loss once, settings and dtypes by turns; the others are a sweep."""

from collections import defaultdict

import pytest


def by_turns(comparisons):
    """Parameters with ids; of each loss one is run, the others are marked slow."""
    groups = defaultdict(list)
    for comparison in comparisons:
        groups[comparison.family, comparison.loss].append(comparison)
    return [
        pytest.param(comparison, id=str(comparison), marks=() if i == turn % len(group) else pytest.mark.slow)
        for turn, group in enumerate(groups.values())
        for i, comparison in enumerate(group)
    ]
