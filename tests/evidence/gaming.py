"""What fools a judge without a network: answers that say nothing of a criterion, or the opposite.

    python tests/evidence/gaming.py                  # the judges offline and lexical, 96 prompts
    python tests/evidence/gaming.py --prompts 10     # the first ten of each file

For every criterion of the built-in prompts that is judged (no check) and worth something (weight
above 0) one answer per attack; a row has the share of them that the judge calls met. The first rows
are what a judge should do: call criteria met by the prompt's own reference, and its faults not.
Standard output gets a Markdown table with 95 % intervals over prompts.
"""

import argparse
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import rar
from judge import (
    SMALL_WORDS,
    LexicalJudge,
    Question,
    offline_judge,
    render_conversation,
)

RESAMPLES = 2_000
FRAME = re.compile(
    r"^(?:States?|Explains?|Mentions?|Advises?|Recommends?|Suggests?|Describes?|Tells the reader"
    r"|Names?|Gives?|Says?|Notes?|Lists?)\s+(that\s+|to\s+)?",
)
# How people deny: a whole sentence, or an act.
NOT_TRUE = [
    "It is not true that {}.",
    "It is wrong to say that {}.",
    "Nobody should believe that {}.",
]
NOT_DONE = ["Avoid {}.", "There is no need for {}.", "{} does not help.", "Never try {}."]


class Case(NamedTuple):
    """A criterion, its prompt, another prompt, and a source of chance."""

    example: rar.Example
    criterion: rar.Criterion
    other: rar.Example
    draw: random.Random


def words_of(text: str) -> list[str]:
    """All words of a text, as they are written."""
    return re.findall(r"[^\W_]+", text)


def shuffled_content(case: Case) -> str:
    """The content words of the criterion, as they are written, in an order of chance."""
    small = set(SMALL_WORDS.split())
    words = [word for word in words_of(case.criterion.text) if word.lower() not in small]
    case.draw.shuffle(words)
    return " ".join(words) + "."


def appended(case: Case) -> str:
    """Another prompt's reference, and the same words after it."""
    return f"{case.other.reference} {shuffled_content(case)}"


def all_shuffled(case: Case) -> str:
    """Every word of the criterion, small ones too, in an order of chance."""
    words = words_of(case.criterion.text)
    case.draw.shuffle(words)
    return " ".join(words) + "."


def negated(case: Case) -> str:
    """The opposite of what the criterion asks for, in plain words."""
    text = case.criterion.text.rstrip(".")
    frame = FRAME.match(text)
    inside = text[frame.end() :] if frame else text
    if frame and frame.group(1) == "that ":
        return case.draw.choice(NOT_TRUE).format(inside)
    if frame and frame.group(1) == "to ":
        return f"Do not {inside}."
    denied = case.draw.choice(NOT_DONE).format(inside)
    return denied[0].upper() + denied[1:]


def other_reference(case: Case) -> str:
    """A good answer to another prompt."""
    return case.other.reference


def list_of_words(case: Case) -> str:
    """The content words of the criterion as a list."""
    return "\n".join("- " + word for word in shuffled_content(case).rstrip(".").split())


def question_copied(case: Case) -> str:
    """The question instead of an answer."""
    return case.example.question


def criterion_itself(case: Case) -> str:
    """The criterion as it is written: the limit of any judge that is shown the rubric's words."""
    return case.criterion.text


def own_reference(case: Case) -> str:
    """The prompt's own good answer."""
    return case.example.reference


ATTACKS: dict[str, Callable[[Case], str]] = {
    "content words shuffled": shuffled_content,
    "the same after another answer": appended,
    "all words shuffled": all_shuffled,
    "negated": negated,
    "another prompt's reference": other_reference,
    "a list of its content words": list_of_words,
    "the question copied": question_copied,
    "the criterion itself": criterion_itself,
}


def make_cases(examples: list[rar.Example], is_fault: bool = False) -> list[Case]:
    """The judged criteria of the prompts: those worth something, or the faults."""
    cases = []
    for place, example in enumerate(examples):
        other = examples[(place + 1) % len(examples)]
        for number, criterion in enumerate(example.rubric):
            if not criterion.check and (criterion.weight < 0) == is_fault:
                draw = random.Random(f"{example.id}-{number}")
                cases.append(Case(example, criterion, other, draw))
    return cases


def met(judge, cases: list[Case], write: Callable[[Case], str]) -> list[float]:
    """The judge's score of each case's answer."""
    questions = []
    for case in cases:
        conversation = render_conversation(case.example.prompt)
        is_fault = case.criterion.weight < 0
        questions.append(Question(conversation, write(case), case.criterion.text, is_fault))
    return [verdict.score for verdict in judge.ask(questions)]


def rate(cases: list[Case], scores: list[float]) -> tuple[float, float, float]:
    """The mean with its 95 % interval, prompts resampled."""
    by_prompt = {}
    for case, score in zip(cases, scores):
        by_prompt.setdefault(case.example.id, []).append(score)
    sums = np.array([sum(values) for values in by_prompt.values()])
    sizes = np.array([len(values) for values in by_prompt.values()])
    picked = np.random.default_rng(0).integers(0, len(sums), (RESAMPLES, len(sums)))
    means = sums[picked].sum(1) / sizes[picked].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return sums.sum() / sizes.sum(), low, high


def gaming_table(judges: dict, examples: list[rar.Example]) -> dict[str, dict]:
    """{row: {name of a judge: (rate, low, high)}}."""
    cases = make_cases(examples)
    faults = make_cases(examples, is_fault=True)
    rows = {
        "own reference (should be met)": (cases, own_reference),
        "own reference, faults (should not)": (faults, own_reference),
    }
    for name, write in ATTACKS.items():
        rows[name] = (cases, write)

    table = {}
    for row, (asked, write) in rows.items():
        table[row] = {}
        for name, judge in judges.items():
            # The same draws for each judge.
            fresh = []
            for number, case in enumerate(asked):
                fresh.append(case._replace(draw=random.Random(f"{row}-{number}")))
            table[row][name] = rate(asked, met(judge, fresh, write))
    return table


def read_prompts(size: int | None = None) -> list[rar.Example]:
    """The built-in prompts with a reference; the first `size` of each file."""
    examples = []
    for name in ("train", "heldout"):
        examples += rar.read_examples(ROOT / "data" / f"{name}.jsonl")[:size]
    return examples


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, metavar="N", help="the first N prompts of each file")
    size = parser.parse_args().prompts
    examples = read_prompts(size)
    judges = {"offline": offline_judge(), "lexical": LexicalJudge()}
    print(f"{len(make_cases(examples))} criteria of {len(examples)} prompts\n")
    print("| answer | " + " | ".join(judges) + " |")
    print("|---|" + "---|" * len(judges))
    for row, cells in gaming_table(judges, examples).items():
        shown = []
        for mean, low, high in cells.values():
            shown.append(f"{100 * mean:.0f} % ({100 * low:.0f} to {100 * high:.0f})")
        print(f"| {row} | " + " | ".join(shown) + " |")


if __name__ == "__main__":
    main()
