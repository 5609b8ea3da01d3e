"""The examples in docstrings say what the code does."""

import doctest
import importlib

import pytest

MODULES = (
    "data.catalog", "data.split", "judging.confidence", "judging.evaluation", "judging.pseudo_labels",
    "judging.transfer", "params.file", "prompts.layout", "prompts.prefix_tree", "training",
)  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_hold(name: str) -> None:
    found = doctest.testmod(importlib.import_module(f"coop_core.{name}"), optionflags=doctest.NORMALIZE_WHITESPACE)

    assert found.attempted > 0
    assert found.failed == 0
