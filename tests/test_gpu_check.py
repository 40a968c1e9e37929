"""The checks for a GPU in their tiny form: their code runs, on a CPU, before a card is there."""

import json
import sys
import time

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests" / "evidence"))
import gpu_check

TINY = gpu_check.Machine("cpu", True)
# These limit or leave the process that they run in.
APART = ("out_of_memory", "torchrun", "vllm")


@pytest.mark.parametrize("name", [name for name in gpu_check.CHECKS if name not in APART])
def test_a_check_keeps_its_bound(name):
    row = gpu_check.run_check(name, TINY)
    assert row["result"] == "ok", row
    assert len(row) > 4 and json.loads(json.dumps(gpu_check.rounded(row)))["check"] == name


@pytest.mark.long
@pytest.mark.parametrize("name", APART)
def test_a_check_in_a_process_of_its_own(name):
    row = gpu_check.run_apart(name, True, 300)
    assert row["result"] in ("ok", "skipped"), row
    # vLLM's may be skipped, and says why.
    assert row["result"] == "ok" or (name == "vllm" and row["why"])


def test_a_check_that_fails_or_is_skipped_is_a_line(monkeypatch):
    def skips(machine):
        raise gpu_check.Skipped("no such card")

    monkeypatch.setitem(gpu_check.CHECKS, "speed", (lambda machine: 1 / 0, 9))
    monkeypatch.setitem(gpu_check.CHECKS, "memory", (skips, 9))
    failed = gpu_check.run_check("speed", TINY)
    assert failed["result"] == "failed" and "ZeroDivisionError" in failed["why"]
    skipped = gpu_check.run_check("memory", TINY)
    assert (skipped["result"], skipped["why"]) == ("skipped", "no such card")


def test_a_check_that_takes_too_long_is_ended_with_what_it_started():
    started = time.monotonic()
    row = gpu_check.run_apart("torchrun", True, 1.0)
    assert row["result"] == "timed out" and time.monotonic() - started < 20


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_how_to_try_it(capsys):
    assert gpu_check.main([]) == 2
    assert "--tiny" in capsys.readouterr().err
