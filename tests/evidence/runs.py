"""Runs of a study: finished ones are not run again, and one that was stopped goes on."""

import shutil
from pathlib import Path

from train import read_log


def has_checkpoint(folder: Path) -> bool:
    """Whether the run can be resumed."""
    return (folder / "checkpoint" / "trainer.pt").exists()


def is_finished(folder: Path, steps: int) -> bool:
    """Whether the run's last checkpoint and last evaluation are there."""
    if not has_checkpoint(folder):
        return False
    rows = read_log(folder / "metrics.jsonl")
    return bool(rows) and rows[-1]["step"] == steps and "eval_score" in rows[-1]


def flags_of_run(folder: Path, flags: list[str]) -> list[str]:
    """train.py's flags for a run into this folder: those given, or --resume for one that began."""
    if has_checkpoint(folder):
        return ["--resume", str(folder)]
    # Killed before its first checkpoint: from the beginning.
    shutil.rmtree(folder, ignore_errors=True)
    return [*flags, "--out", str(folder)]
