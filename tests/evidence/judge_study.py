"""Which of RaR's six designs orders answers as people do, with your judge, on your data?

The paper compares ways to make a reward of a judge's opinion (section 4.3) by asking how often the
reward prefers the answer that people prefer. This is that comparison for any judge on any data:

    python tests/evidence/judge_study.py --judge URL --judge_model NAME --data FILE
    python tests/evidence/judge_study.py --data FILE    # --judge offline or lexical: two designs

FILE has one JSON object per line, in one of two formats.

  Questions with several answers: a row as train.py reads it (ours or HealthBench's), and its
  answers with a number by which people order them. Two answers with different numbers are a pair.

    {"id": "...", "question": "...", "reference": "...", "rubric": [{"text": "...", "weight": 5}],
     "answers": [{"text": "...", "human": 0.8}, {"text": "...", "human": 0.2}]}

  Labels of statements, as tools/agreement.py reads them (K-QA with physicians' labels): one row per
  statement. The statements about a question are its rubric, a category "Must_have" weighs 1.0 and
  any other 0.3; the human number of an answer is the share of that weight which people find in it.
  A question with one answer has no pair and is left out.

    {"question": "...", "response": "...", "criterion": "...", "met": true, "category": "Must_have"}

What is printed. agreement: the share of pairs that the reward orders as people do (a tie counts
half), averaged over the questions, so that one with many answers does not drown the others; with
a 95 % interval by resampling whole questions, and the difference to explicit, paired question by
question, with p-values for all designs together (Holm). A pair of which one answer could not be
scored is left out and counted. cost: calls to the judge and tokens per answer; explicit and points
ask the same questions, which are asked once (what had no answer, once more). Needs a judge that
answers yes or no and rates; the design that compares with a reference answer leaves out the
questions without one.
"""

import argparse
import math
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from intervals import Row, compare_arms, crossed_bootstrap, score_table

from judge import JudgeError, LexicalJudge, LLMJudge, offline_judge
from rar import (
    DESIGNS,
    ZERO_STD,
    Criterion,
    DataError,
    Example,
    Group,
    RubricReward,
    parse_example,
    read_rows,
)

BASELINE = "explicit"
# K-QA's physicians name what an answer must have and what is nice to have: the paper's weights of
# an essential and an optional criterion.
LABEL_WEIGHTS = {"must_have": 1.0}
OTHER_WEIGHT = 0.3


class Question(NamedTuple):
    """A question with its answers and what people think of each."""

    example: Example
    answers: list[str]
    human: list[float]  # one per answer: the higher, the better

    def pairs(self) -> list[tuple[int, int]]:
        """(better, worse): the places of two answers that people do not find equally good."""
        # Every pair once, the better answer first; equal ones are no pair.
        pairs = []
        for better, above in enumerate(self.human):
            for worse, below in enumerate(self.human):
                if above > below:
                    pairs.append((better, worse))
        return pairs


# ------------------------------------------------------------------------- the data


def read_questions(path: str) -> list[Question]:
    """The questions of a file that have a pair, in either format. Raises DataError."""
    # The two formats are told by their columns, row by row, and never mixed.
    labels = []
    questions = []
    for where, row in read_rows(path):
        if isinstance(row, dict) and "criterion" in row and "met" in row:
            labels.append((where, row))
        else:
            questions.append(read_answers(row, where))
    if labels and questions:
        raise DataError(f"{path}: labels and rows with answers in one file; give one kind")
    if labels:
        questions = read_labels(labels)

    # A question is the cluster that is resampled: twice the same id would be one cluster of two.
    ids = set()
    for question in questions:
        if question.example.id in ids:
            raise DataError(f"{path}: id {question.example.id!r} twice; give each question its own")
        ids.add(question.example.id)

    # Without two answers that people tell apart there is nothing to agree on.
    usable = [question for question in questions if question.pairs()]
    if not usable:
        rule = "no question has two answers that people rate differently"
        raise DataError(f"{path}: {rule}; see the formats in judge_study.py --help")
    return usable


def read_answers(row: object, where: str) -> Question:
    """A row with its answers. Raises DataError."""
    # The row itself is checked as strictly as for training.
    example = parse_example(row, where)
    entries = row.get("answers")
    if not isinstance(entries, list):
        raise DataError(f"{where}: no 'answers'; give a list of objects with 'text' and 'human'")

    answers = []
    human = []
    for number, entry in enumerate(entries, 1):
        # Python counts true and false among its numbers.
        text = entry.get("text") if isinstance(entry, dict) else None
        value = entry.get("human") if isinstance(entry, dict) else None
        is_number = type(value) in (int, float) and math.isfinite(value)
        if not isinstance(text, str) or not is_number:
            raise DataError(f"{where}: answer {number} needs 'text' and a number 'human'")
        answers.append(text)
        human.append(float(value))
    return Question(example, answers, human)


def read_labels(rows: list[tuple[str, dict]]) -> list[Question]:
    """Questions from labels of statements: one per question, with all its answers."""
    # The statements about a question and what people found in each answer, in the file's order.
    rubrics = defaultdict(dict)
    found = defaultdict(lambda: defaultdict(dict))
    for where, row in rows:
        for key in ("question", "response", "criterion"):
            if not isinstance(row.get(key), str) or not row[key].strip():
                raise DataError(f"{where}: a label needs 'question', 'response' and 'criterion'")
        if not isinstance(row["met"], bool):
            raise DataError(f"{where}: 'met' must be true or false")
        # The same statement about two answers is one criterion of one rubric.
        text = row["criterion"].strip()
        category = str(row.get("category", "")).lower()
        weight = LABEL_WEIGHTS.get(category, OTHER_WEIGHT)
        rubrics[row["question"]][text] = Criterion(text, weight)
        found[row["question"]][row["response"]][text] = row["met"]

    questions = []
    for number, (question, criteria) in enumerate(rubrics.items()):
        answers = []
        human = []
        for response, met in found[question].items():
            # An answer without a label for every statement would be rated on another rubric.
            if len(met) < len(criteria):
                continue
            points = sum(criteria[text].weight for text in criteria if met[text])
            answers.append(response)
            human.append(points / sum(criterion.weight for criterion in criteria.values()))
        # The labels have no ids, and the number of the question stays the same from run to run.
        prompt = [{"role": "user", "content": question}]
        example = Example(f"question {number}", prompt, list(criteria.values()))
        questions.append(Question(example, answers, human))
    return questions


# ------------------------------------------------------------------------- one design


class Result(NamedTuple):
    """What a design made of the questions."""

    rows: list[Row]  # (question, 0, share of its pairs in the right order)
    pairs: int
    unscored: int  # pairs left out, because one answer has no reward
    ties: int
    answers: int
    stats: dict  # LLMJudge.take_stats


def order_score(better: float, worse: float) -> float:
    """1 when the reward prefers the better answer, 0.5 for a tie, else 0."""
    if abs(better - worse) <= ZERO_STD:
        return 0.5
    return float(better > worse)


def run_design(judge, name: str, questions: list[Question]) -> Result:
    """Rewards every answer by one design and compares their order with people's."""
    # The reward of training itself, with all of its rules for silence and missing verdicts.
    method = RubricReward(judge, SimpleNamespace(method=name, advantage="std"))
    groups = []
    used = []
    for question in questions:
        # The design that compares with a reference answer needs one.
        if method.can_learn_from(question.example):
            rollouts = [SimpleNamespace(text=answer) for answer in question.answers]
            groups.append(Group(question.example, rollouts))
            used.append(question)
    if groups:
        method.score(groups, show_progress=True)

    rows = []
    n_pairs = 0
    unscored = 0
    ties = 0
    for question, (_, rollouts) in zip(used, groups, strict=True):
        # Pairs of one question share its answers: they make one figure, not several.
        scores = []
        for better, worse in question.pairs():
            n_pairs += 1
            of_better = rollouts[better].reward
            of_worse = rollouts[worse].reward
            # A missing verdict is no opinion: neither right nor wrong.
            if math.isnan(of_better) or math.isnan(of_worse):
                unscored += 1
                continue
            scores.append(order_score(of_better, of_worse))
            ties += scores[-1] == 0.5
        if scores:
            rows.append((question.example.id, 0, statistics.fmean(scores)))
    # What was paid belongs to this design: the judge counts from zero again.
    n_answers = sum(len(rollouts) for _, rollouts in groups)
    return Result(rows, n_pairs, unscored, ties, n_answers, judge.take_stats())


def usable_designs(judge) -> list[str]:
    """The designs that this judge can be asked by."""
    # A judge that compares words has no opinion to rate with.
    if isinstance(judge, LLMJudge):
        return list(DESIGNS)
    return [name for name, design in DESIGNS.items() if not design.needs_model]


def make_judge(args: argparse.Namespace):
    """The judge that the arguments name. Raises JudgeError."""
    if args.judge == "offline":
        return offline_judge()
    if args.judge == "lexical":
        return LexicalJudge()
    # However many verdicts are missing: their share is one of the figures.
    return LLMJudge(args.judge, args.judge_model, args.judge_k, args.cache, max_missing=1.0)


# ------------------------------------------------------------------------- the report


def cost_cells(result: Result) -> list[str]:
    """Calls made and tokens, per answer."""
    # Per answer, so that designs with and without the reference can be compared.
    stats = result.stats
    calls = stats.get("judge_calls", 0)
    if not result.answers:
        return ["", "", ""]
    if not calls:
        # Nothing was paid now: all answers were there already (those of another design), or were
        # counted by the offline judge.
        return ["0", "0", "0"]
    cells = [f"{calls / result.answers:.1f}"]
    for key in ("judge_prompt_tokens", "judge_completion_tokens"):
        cells.append(f"{stats.get(key, 0) / result.answers:,.0f}")
    return cells


def report(results: dict[str, Result]) -> None:
    """The table, the best design first."""
    # A design without any scored pair has nothing to compare.
    arms = {name: result.rows for name, result in results.items() if result.rows}
    differences = {}
    if arms.get(BASELINE) and len(arms) > 1:
        for comparison in compare_arms(arms, BASELINE):
            differences[comparison.arm] = comparison

    # One run per design, so the questions alone are resampled.
    intervals = {name: crossed_bootstrap(score_table(rows)) for name, rows in arms.items()}
    # How many questions stand behind a figure comes before the figure.
    heads = ["design", "questions", "pairs", "unscored", "ties", "agreement", "95 % interval"]
    heads += [f"against {BASELINE}", "p, Holm", "calls", "tokens in", "tokens out"]
    print("| " + " | ".join(heads) + " |")
    print("|---" * len(heads) + "|")
    for name in sorted(arms, key=lambda name: -intervals[name].mean):
        result = results[name]
        interval = intervals[name]
        cells = [name, len(result.rows), result.pairs, result.unscored, result.ties]
        cells += [f"{interval.mean:.3f}", f"{interval.low:.3f} to {interval.high:.3f}"]
        if name in differences:
            crossed = differences[name].crossed
            cells.append(f"{crossed.mean:+.3f} ({crossed.low:+.3f} to {crossed.high:+.3f})")
            cells.append(f"{differences[name].p_holm:.3f}")
        else:
            cells += ["", ""]
        print("| " + " | ".join(str(value) for value in [*cells, *cost_cells(result)]) + " |")

    # Said, because a design that is not in the table looks forgotten.
    left_out = [name for name in results if name not in arms]
    if left_out:
        print(f"\nWithout a scored pair: {', '.join(left_out)}.")
    print("\nagreement: share of pairs ordered as by people, ties half, mean over questions; 0.5")
    print("is chance. Intervals resample questions. calls, tokens: paid now, per answer.")


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> None:
        """Ends the program with status 2."""
        self.exit(2, f"judge_study.py: {message}; --help shows how\n")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 2 after one line about what is wrong."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="FILE", help="questions with answers")
    parser.add_argument("--judge", default="offline", metavar="URL", help="or offline, lexical")
    parser.add_argument("--judge_model", default="", metavar="NAME", help="the model's name there")
    parser.add_argument("--judge_k", type=int, default=1, help="criteria per call (0: all)")
    parser.add_argument("--designs", nargs="+", choices=list(DESIGNS), help="only these")
    parser.add_argument("--cache", metavar="FILE", help="keep the judge's answers (SQLite)")
    args = parser.parse_args(argv)

    # The data first: a mistake there must not cost a call to the judge.
    try:
        questions = read_questions(args.data)
        judge = make_judge(args)
        results = {}
        for name in args.designs or usable_designs(judge):
            results[name] = run_design(judge, name, questions)
        report(results)
    except (DataError, JudgeError) as error:
        print(f"judge_study.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
