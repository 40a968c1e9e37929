"""Reads the polarity of RaR's released pitfalls and compares it with labels given one by one.

    python tests/evidence/reproduce_polarity.py FILE.jsonl [FILE.jsonl ...]

FILE: rows with rubrics of RaR-Medicine or RaR-Science. The labelled items are in the samples that
github.com/Lvchangze/rubric_harness publishes (commit 5a7c33d): exports/rubrics/
rar_medicine_shipped.jsonl and rar_science_shipped.jsonl.

pitfall_labels.tsv has no text of theirs. Its columns: the first 12 hex digits of the SHA-256 of a
description without its category; the part (looked at while the rule was written, or kept back);
medicine or science; and the label: good or bad when met, or unclear.
"""

import argparse
import hashlib
import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import rar
from data import prepare

LABELS = Path(__file__).with_name("pitfall_labels.tsv")


def read_labels() -> dict[str, tuple[str, str, str]]:
    """From the key of a description to (part, source, label)."""
    labels = {}
    for line in LABELS.read_text().splitlines():
        key, part, source, label = line.split("\t")
        labels[key] = (part, source, label)
    return labels


def key_of(text: str) -> str:
    """What stands for a description in the table of labels."""
    return hashlib.sha256(text.strip().encode()).hexdigest()[:12]


def read_items(paths: list[str]) -> dict[str, tuple[str, str]]:
    """From the key of every description in the files to (text, title)."""
    items = {}
    for path in paths:
        for _, row in rar.read_rows(path):
            for item in row["rubric"]:
                _, text = prepare.split_prefix(item["description"])
                items[key_of(text)] = (text.strip(), item["title"])
    return items


def wilson(right: int, n: int) -> tuple[float, float]:
    """The 95 % interval of Wilson for a share of n items, from 0 to 1."""
    z = 1.96
    share = right / n
    spread = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    middle = share + z**2 / (2 * n)
    scale = 1 + z**2 / n
    return (middle - spread) / scale, (middle + spread) / scale


def print_line(name: str, chosen: list[tuple[str, str, str]]) -> None:
    """One line of the table, for items (text, title, label) of which none is unclear."""
    by_wording = 0
    by_both = 0
    undecided = 0
    undecided_bad = 0
    for text, title, label in chosen:
        is_good = label == "good"
        by_wording += rar.names_avoidance(text) == is_good
        by_both += rar.names_avoidance(text, title) == is_good
        # Read as the fault, as the ones that can be decided mostly are.
        if rar.pitfall_polarity(text, title) == 0:
            undecided += 1
            undecided_bad += not is_good

    n = len(chosen)
    low, high = wilson(by_both, n)
    good = sum(label == "good" for _, _, label in chosen)
    print(
        f"{name:<20} n {n:>3}  good {good:>3}  wording alone {by_wording / n:.3f}"
        f"  with title {by_both / n:.3f} ({low:.3f} to {high:.3f})"
        f"  undecided {undecided}, bad {undecided_bad}"
    )


def main() -> None:
    """Prints a line per part and source."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="+", metavar="FILE.jsonl")
    args = parser.parse_args()

    labels = read_labels()
    items = read_items(args.files)
    missing = 0
    chosen = {}
    for key, (part, source, label) in labels.items():
        if key not in items:
            missing += 1
        elif label != "unclear":
            for name in (part, f"{part}, {source}"):
                chosen.setdefault(name, []).append((*items[key], label))

    # A part of the items would be another result.
    if missing:
        print(f"{missing} of {len(labels)} labelled items are not in these files", file=sys.stderr)
    for name, part_items in chosen.items():
        print_line(name, part_items)


if __name__ == "__main__":
    main()
