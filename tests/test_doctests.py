"""Every example in every docstring runs."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["judge", "rar", "grpo", "rler", "arlrr", "train"])
def test_docstring_examples(name):
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert failed == 0 and tried > 0
