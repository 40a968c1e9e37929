"""How far a judge agrees with people, and what a judge's cache cost.

    python tools/agreement.py labels.jsonl
    python tools/agreement.py labels.jsonl --judge http://localhost:8000/v1 --judge_model NAME
    python tools/agreement.py --cache runs/judge_cache.sqlite --export answers.jsonl

labels.jsonl has one object per line with the keys `response`, `criterion`, `met` (true or false),
and optionally `question`. Standard output gets one JSON line per judge (or per model of a cache),
standard error the same as a table.
"""

import argparse
import json
import random
import sqlite3
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from judge import (
    Cache,
    JudgeError,
    LexicalJudge,
    LLMJudge,
    Question,
    offline_judge,
    render_conversation,
)
from tools import report

RESAMPLES = 2000


def judge_agreement(pairs: list[tuple[float | None, bool]]) -> dict:
    """Accuracy, Cohen's kappa, macro-F1 and the share of missing verdicts.

    pairs: (the judge's score or None, the human label). Missing verdicts are counted, not guessed:
    they stay out of the other figures. Kappa is 0 for chance and 1 for identity; physicians among
    themselves reach 0.66 to 0.75 on K-QA.

    >>> judge_agreement([(1.0, True), (1.0, True), (0.0, False), (1.0, False), (None, True)])
    {'n': 5, 'accuracy': 0.75, 'kappa': 0.5, 'macro_f1': 0.7333, 'missing': 0.2}
    """
    tp, fp, fn, tn = confusion(pairs)

    # Without a single verdict there is no figure, and 0 would look like one.
    n = tp + fp + fn + tn
    result = {"n": len(pairs), "accuracy": None, "kappa": None, "macro_f1": None, "missing": 0.0}
    if pairs:
        result["missing"] = round(1 - n / len(pairs), 4)
    if n == 0:
        return result

    result["accuracy"] = round((tp + tn) / n, 4)
    result["kappa"] = round(kappa([tp, fp, fn, tn]), 4)

    # The mean over both labels: always "not met" must not look good where few are met.
    wrong = fp + fn
    f1_met = 2 * tp / max(1, 2 * tp + wrong)
    f1_not_met = 2 * tn / max(1, 2 * tn + wrong)
    result["macro_f1"] = round((f1_met + f1_not_met) / 2, 4)
    return result


def confusion(pairs: list[tuple[float | None, bool]]) -> list[int]:
    """Counts of right and wrong "met", wrong and right "not met"; missing verdicts in none."""
    counts = [0, 0, 0, 0]
    for score, label in pairs:
        if score is None:
            continue
        if score >= 0.5:
            counts[0 if label else 1] += 1
        else:
            counts[2 if label else 3] += 1
    return counts


def kappa(counts: list[int]) -> float:
    """Cohen's kappa: the agreement beyond chance, of that which is possible beyond chance."""
    tp, fp, fn, tn = counts
    n = tp + fp + fn + tn
    # n * n times the agreement that two raters with these shares of "met" reach by chance.
    chance = (tp + fp) * (tp + fn) + (tn + fn) * (tn + fp)
    if chance == n * n:
        return 0.0
    return (n * (tp + tn) - chance) / (n * n - chance)


def kappa_interval(pairs: list[tuple[float | None, bool]], questions: list[str]) -> list[float]:
    """95 % interval of kappa: questions are resampled, each with all of its rows."""
    # Rows of one question share a response or a theme: they are no independent values.
    by_question = {}
    for pair, question in zip(pairs, questions):
        by_question.setdefault(question, []).append(pair)
    counts = [confusion(group) for group in by_question.values()]

    draw = random.Random(0)
    kappas = []
    for _ in range(RESAMPLES):
        picked = draw.choices(counts, k=len(counts))
        kappas.append(kappa([sum(column) for column in zip(*picked)]))
    kappas.sort()
    return [round(kappas[int(share * RESAMPLES)], 4) for share in (0.025, 0.975)]


def read_labels(path: str) -> list[dict]:
    """Rows with `response`, `criterion`, `met`, `question` ("" where a row has none).

    Raises ValueError: file, line and what to do.
    """
    kinds = {"response": str, "criterion": str, "met": bool, "question": str}
    rows = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            # A blank line at the end is no mistake.
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                raise ValueError(f"{where}: not a line of JSON") from None

            # A label that is no true or false would be counted as one of them.
            is_row = isinstance(row, dict)
            if is_row:
                row = {"question": ""} | row
            for key, kind in kinds.items():
                is_row = is_row and isinstance(row.get(key), kind)
            if not is_row:
                message = "needs the keys response, criterion and met (true or false)"
                raise ValueError(f"{where}: {message}; question, where there is one, is a text")
            rows.append(row)
    if not rows:
        raise ValueError(f"{path}: no rows; give one JSON object per line")
    return rows


def judge_labels(judge, rows: list[dict]) -> dict:
    """Agreement of a judge with human labels, and how far it leans on length.

    kappa_ci: 95 % interval over questions (responses where a row has none), if there are several.
    length_bias: correlation of "the judge says met, the human does not" (+1; -1 for the reverse)
    with the length of the response. For a language model also repeatability: the share of rows with
    the same verdict when it is asked again without the cache.
    """
    # Asked as in training: the same prompt, one statement about one response.
    questions = []
    for row in rows:
        conversation = render_conversation([{"role": "user", "content": row.get("question", "")}])
        questions.append(Question(conversation, row["response"], row["criterion"]))
    verdicts = judge.ask(questions, show_progress=True)
    pairs = [(verdict.score, row["met"]) for verdict, row in zip(verdicts, rows)]
    result = judge_agreement(pairs)

    # With one question there is nothing to resample. Labels of one response hang together as well.
    asked = [row.get("question") or row["response"] for row in rows]
    result["kappa_ci"] = None
    if len(set(asked)) > 1 and result["kappa"] is not None:
        result["kappa_ci"] = kappa_interval(pairs, asked)

    # Without the cache, or it would repeat itself perfectly.
    if isinstance(judge, LLMJudge):
        judge.cache = Cache(None)
        result["repeatability"] = repeatability(verdicts, judge.ask(questions, show_progress=True))

    errors = []
    lengths = []
    for verdict, row in zip(verdicts, rows):
        if verdict.score is not None:
            errors.append(verdict.score - row["met"])
            lengths.append(len(row["response"]))
    # Without any spread there is no correlation.
    result["length_bias"] = None
    if len(set(errors)) > 1 and len(set(lengths)) > 1:
        result["length_bias"] = round(statistics.correlation(errors, lengths), 4)
    return result


def repeatability(first: list, again: list) -> float | None:
    """The share of verdicts given both times that are the same."""
    # A missing verdict is no other opinion.
    same = []
    for one, other in zip(first, again):
        if one.score is not None and other.score is not None:
            same.append(one.score == other.score)
    if not same:
        return None
    return round(sum(same) / len(same), 4)


def answers_of(cache: Cache) -> Iterator[dict]:
    """All answers of a cache as plain values, in the order in which they came."""
    query = "SELECT key, model, asked, text, answer, prompt_tokens, completion_tokens, time"

    # Read as it is written out: an export of millions of rows takes no memory.
    for row in cache.database.execute(query + " FROM answers ORDER BY time"):
        key, model, asked, text, answer, prompt_tokens, completion_tokens, when = row
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
        values = {"key": key, "model": model, "time": when, "usage": usage}
        values["statements"] = json.loads(asked)
        values["answer"] = text
        yield values | json.loads(answer)


class SavedCache(Cache):
    """A cache that is only looked at: the file may be anybody's, and its answers are paid for."""

    def open(self) -> sqlite3.Connection:
        """The database, which nothing is written to."""
        address = f"{Path(self.path).absolute().as_uri()}?mode=ro"
        # Without a log nobody writes, and then SQLite need make no files of its own beside it.
        if not Path(f"{self.path}-wal").exists():
            address += "&immutable=1"
        return sqlite3.connect(address, uri=True)


def show_cache(path: str, export: str | None) -> list[dict]:
    """One row per model of a cache: calls and tokens. Writes all answers to a new file `export`.

    Raises OSError when there is no such cache, or such an export already; ValueError when the file
    is no cache.
    """
    # A look must not make an empty cache.
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        cache = SavedCache(path)
        rows = costs_of(cache)
        if export:
            export_answers(cache, export)
    except sqlite3.Error as error:
        raise ValueError(f"--cache {path}: not a judge's cache ({error})") from None
    return rows


def export_answers(cache: Cache, export: str) -> None:
    """Writes all answers of a cache to a new file. Raises OSError."""
    # "x" never writes over a file that is there: it may be the cache itself.
    try:
        # Written as it is read: a weekend's answers need no memory.
        with open(export, "x", encoding="utf8") as file:
            file.writelines(json.dumps(row) + "\n" for row in answers_of(cache))
    except FileExistsError:
        raise FileExistsError(f"--export {export}: is there already; name another") from None


def costs_of(cache: Cache) -> list[dict]:
    """One row per model of a cache: calls and tokens."""
    # By model, because each has its own price.
    rows = []
    query = "SELECT model, COUNT(*), SUM(prompt_tokens), SUM(completion_tokens) FROM answers"
    for costs in cache.database.execute(query + " GROUP BY model"):
        model, calls, prompt_tokens, completion_tokens = costs
        row = {"model": model, "calls": calls, "prompt_tokens": prompt_tokens}
        row["completion_tokens"] = completion_tokens
        rows.append(row)
    return rows


def print_rows(rows: list[dict]) -> None:
    """Each row as a JSON line, and all of them as a table for the eye."""
    for row in rows:
        print(json.dumps(row))
    # The table goes to another stream, so that the lines can be piped.
    names = list(rows[0]) if rows else []
    print("".join(f"{name:>20}" for name in names), file=sys.stderr)
    for row in rows:
        print("".join(f"{row.get(name)!s:>20}" for name in names), file=sys.stderr)


def make_judges(args: argparse.Namespace) -> list[tuple]:
    """(name, judge) of each judge that the arguments name. Raises JudgeError."""
    # The stand-ins: what any model has to beat.
    if not args.judge:
        return [("offline", offline_judge()), ("lexical", LexicalJudge())]
    if len(args.judge) != len(args.judge_model):
        advice = "offline and lexical are measured without --judge"
        raise JudgeError(f"--judge needs as many names in --judge_model as it has URLs; {advice}")
    # One after the other, so that each has the machine for itself.
    judges = []
    for url, model in zip(args.judge, args.judge_model):
        # However many verdicts are missing: their share is one of the figures.
        judges.append((model, LLMJudge(url, model, k=args.judge_k, max_missing=1.0)))
    return judges


class Parser(report.Parser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> None:
        """Ends the program with status 2."""
        message = report.without_secrets(message, self.words)
        self.exit(2, f"agreement.py: {message}; --help shows how\n")


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labels", nargs="?", metavar="FILE", help="JSONL with labels of people")
    parser.add_argument("--judge", nargs="+", default=[], metavar="URL", help="base URLs")
    parser.add_argument("--judge_model", nargs="+", default=[], metavar="NAME", help="their models")
    parser.add_argument("--judge_k", type=int, default=1, help="statements per call (0: all)")
    parser.add_argument("--cache", metavar="FILE", help="a judge's cache: calls, tokens by model")
    parser.add_argument("--export", metavar="FILE", help="with --cache: write all answers there")
    return parser


def agree(argv: list[str] | None) -> None:
    """What the command line asks for. Raises OSError, ValueError, JudgeError."""
    parser = make_parser()
    args = parser.parse_args(argv)
    # Exactly one of the two, so that no argument is quietly ignored.
    if bool(args.labels) == bool(args.cache):
        parser.error("give a file with labels, or --cache FILE")
    if args.export and not args.cache:
        parser.error("--export writes what is in --cache FILE")
    if args.cache:
        print_rows(show_cache(args.cache, args.export))
        return
    rows = read_labels(args.labels)
    results = []
    for name, judge in make_judges(args):
        results.append({"judge": name} | judge_labels(judge, rows))
    print_rows(results)


def main(argv: list[str] | None = None) -> int:
    """Exit status 0, or 2 with one line that says what is wrong, where, and what to do."""
    # What a user can mend is one line; anything else is a fault of ours and keeps its traceback.
    return report.run_tool("agreement.py", agree, argv, (OSError, ValueError, JudgeError))


if __name__ == "__main__":
    sys.exit(main())
