"""Every example in every docstring runs."""

import doctest
import importlib.util
import sys

import pytest
from conftest import ROOT

SIX = ["judge", "rar", "grpo", "rler", "arlrr", "train"]
TOOLS = [
    *sorted((ROOT / "tools").glob("*.py")),
    *sorted((ROOT / "data").glob("*.py")),
    ROOT / "tests" / "evidence" / "intervals.py",
]


@pytest.mark.parametrize("name", SIX)
def test_docstring_examples(name):
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert failed == 0 and tried > 0


@pytest.mark.parametrize("path", TOOLS, ids=[path.stem for path in TOOLS])
def test_docstring_examples_of_the_tools(path):
    spec = importlib.util.spec_from_file_location(f"{path.stem}_as_a_file", path)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by its name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    failed, _ = doctest.testmod(module)
    assert failed == 0
