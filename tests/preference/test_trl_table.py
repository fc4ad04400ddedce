"""The table of names beside TRL's: every default of ours in it is the one that stands, and no loss is left out."""

import ast
import inspect
import re

import source_tree
from preference_cases import NOT_LOSSES

from jaxkd import preference

TEXT = (source_tree.ROOT / "docs" / "trl.md").read_text()
# Calls in the last column of a row, such as `dpo(beta=0.1)`.
DEFAULTS = [
    call for row in re.findall(r"^\|.*\|$", TEXT, re.M) for call in re.findall(r"`(\w+\([^`]*\))`", row.split("|")[-2])
]
OWN = {"bco", "f_po", "irpo"}  # which TRL 1.16 has not


def test_defaults():
    assert len(DEFAULTS) > 20
    for text in DEFAULTS:
        call = ast.parse(text, mode="eval").body
        parameters = inspect.signature(getattr(preference, call.func.id)).parameters
        for keyword in call.keywords:
            assert parameters[keyword.arg].default == ast.literal_eval(keyword.value), text


def test_every_name_is_there():
    named = set(re.findall(r"\b\w+\b", TEXT))
    assert set(preference.__all__) - named == OWN | (NOT_LOSSES - named)
    assert {"bias_corrected", "k3", "group_advantages", "alpha_score"} <= named
