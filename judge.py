"""Asking a judge: does this response meet this criterion?

A rubric reward is only as good as the verdicts it adds up. This file holds the one seam through which
every verdict of the project comes, and the judge that answers it without a network:

    questions = [Question(prompt=..., rule=lambda: lexical_verdict(criterion, response)), ...]
    verdicts  = OfflineJudge().ask(questions)            # one Verdict per question, in order

A `Question` carries two things side by side: the prompt for a language model and, where one exists, the
rule that answers the same question offline. A judge picks the one it can use, so the methods (rar.py and
its siblings) never know which judge they talk to, and this file knows no paper.

A `Verdict` has a score in [0, 1] or `None`, which means *missing*. A missing verdict is never 0: a failed
call says nothing about the response, and "0" moves the reward up or down by the sign of the criterion.

The offline judge is a stand-in and can be fooled by stuffing words. What it does:

  form      length, sentences, lists, complete endings, repetition, ... are counted exactly;
  content   a criterion is met when one passage of three sentences holds at least 40 % of the criterion's
            content words (stemmed, a few synonyms). How far that carries is measured, not assumed:

    python judge.py                                       # a worked example
    python judge.py --agreement FILE.jsonl                # accuracy, kappa, macro-F1 against human verdicts

FILE.jsonl has one object per line with the keys `response`, `criterion` and `met` (true or false).
"""

import argparse
import json
import re
import sys
from dataclasses import dataclass, field
from typing import Callable, NamedTuple

from tqdm import tqdm

# ------------------------------------------------------------------------------------------- the seam


class Verdict(NamedTuple):
    """A judge's answer to one question.

    score: number in [0, 1] (1 = the criterion is met), or None when the judge gave no usable answer.
    reason: one short line a person can read in the samples file.
    """

    score: float | None
    reason: str = ""


@dataclass
class Question:
    """One thing to ask: `prompt` for a language model, `rule` for the offline judge (None: it cannot know)."""

    prompt: str
    rule: Callable[[], Verdict] | None = None


class NoOfflineRule(ValueError):
    """The offline judge was asked something only a language model can answer."""


@dataclass
class OfflineJudge:
    """Answers every question by its rule. Deterministic, no network, a few microseconds a verdict.

    >>> OfflineJudge().ask([Question("Is it short?", lambda: lexical_verdict("Has at most two sentences.", "Yes."))])
    [Verdict(score=1.0, reason='1 sentences')]
    """

    name: str = "offline"
    stats: dict = field(default_factory=lambda: {"asked": 0, "missing": 0})

    def ask(self, questions: list[Question], progress: bool = False) -> list[Verdict]:
        """Verdicts in the order of the questions. Raises NoOfflineRule for a question without a rule."""
        verdicts = []
        for question in tqdm(questions, "judge", leave=False, disable=None if progress else True):
            if question.rule is None:
                raise NoOfflineRule("the offline judge has no rule for this question: it needs a language model")
            verdicts.append(question.rule())
        self.stats["asked"] += len(verdicts)
        self.stats["missing"] += sum(v.score is None for v in verdicts)
        return verdicts


# ------------------------------------------------------------------------------------------- words

# Words that carry no content of their own. The second part is the frame that criteria are written in
# ("The response states that ..."): without it every criterion would ask for the word "states".
STOP = set(
    "a an the and or but if then than so of in on at to for from by with without about as into over under between is "
    "are was were be been being am do does did doing have has had having will would shall should can could may might "
    "must not no nor it its this that these those there here he she they them their his her your yours we our us i me "
    "my mine what which who whom whose when where why how all any both each few more most other some such only own "
    "same too very just also one however therefore because while during "
    "response answer reader user you states state mentions mention explains explain advises advise recommends "
    "recommend suggests suggest says say tells tell claims claim notes note describes describe includes include".split()
)
# Everyday names of one idea that rubrics and answers use for each other. Few on purpose: wider lists (any
# "professional", any "call" or "visit") made the agreement with physicians worse, kappa 0.35 instead of 0.38.
SYNONYMS = {
    word: names[0]
    for names in (
        ("doctor", "physician", "gp", "clinician"),
        ("emergency", "ambulance", "911", "112", "999"),
        ("medicine", "medication", "drug", "tablet", "pill"),
        ("see", "seeing", "seen", "consult"),
    )
    for word in names
}
ENDINGS = (
    "ization ational iveness fulness ations ation ments ment ingly edly ness ies ing ers ed es er ly s e y".split()
)


def stem(word: str) -> str:
    """A crude stem: the first matching ending goes, if at least four letters stay.

    >>> [stem(w) for w in "recommending infections infection rest resting".split()]
    ['recommend', 'infection', 'infection', 'rest', 'rest']
    """
    for ending in ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= 4:
            return word[: -len(ending)]
    return word


def content_words(text: str) -> list[str]:
    """Stemmed content words in order, numbers kept. Any script: a word is a run of letters or digits.

    >>> content_words("States that the patient should see a physician.")
    ['patient', 'see', 'doctor']
    """
    words = re.findall(r"[^\W_]+", text.lower())
    return [stem(SYNONYMS.get(w, w)) for w in words if w not in STOP and (len(w) > 1 or not w.isascii() or w.isdigit())]


def sentences(text: str) -> list[str]:
    """Sentences and list lines. A dot ends a sentence only when a space or the end follows, so "2.5 g" stays whole.

    >>> sentences("Rest. Drink 2.5 litres!\\n1. Sleep\\n2. Eat")
    ['Rest.', 'Drink 2.5 litres!', 'Sleep', 'Eat']
    """
    lines = (LIST_MARK.sub("", line) for line in text.split("\n"))
    parts = (part.strip() for line in lines for part in re.split(r"(?<=[.!?。！？])\s+|(?<=[。！？])", line))
    return [part for part in parts if re.search(r"\w", part)]


LIST_MARK = re.compile(r"^\s*(?:[-*•–]|\d{1,2}[.)])(?:\s+|$)")


# ------------------------------------------------------------------------------------------- form, counted exactly


def repetition(text: str) -> float:
    """Share of word triples that already occurred: 0 for ordinary short text, towards 1 for loops.

    >>> repetition("drink water and rest"), round(repetition("drink more water " * 4), 2)
    (0.0, 0.7)
    """
    words = re.findall(r"\w+", text.lower())
    triples = list(zip(words, words[1:], words[2:]))
    return 1 - len(set(triples)) / len(triples) if triples else 0.0


def ends_complete(text: str) -> bool:
    """The last line ends in final punctuation and is more than a bare list number ("3.").

    >>> ends_complete("Rest and drink."), ends_complete("1. Rest.\\n2."), ends_complete("Rest and")
    (True, False, False)
    """
    lines = text.rstrip().split("\n")
    return bool(re.search(r"[.!?。！？…][\"'”’)\]*]*$", lines[-1])) and bool(re.search(r"\w", LIST_MARK.sub("", lines[-1])))


def list_items(text: str) -> int:
    """Number of list lines that say something."""
    return sum(bool(LIST_MARK.match(line) and re.search(r"\w", LIST_MARK.sub("", line))) for line in text.split("\n"))


NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
COUNTERS = {
    "word": lambda text: len(text.split()),
    "sentence": lambda text: len(sentences(text)),
    "item": list_items,
    "point": list_items,
}
# A criterion that matches one of these is decided by counting, not by word overlap. The patterns are narrow
# on purpose: a clinical criterion that happens to contain "list" or "question" must not end up here.
FORMS: list[tuple[str, Callable[[str], tuple[bool, str]]]] = [
    (r"^ends with a complete sentence", lambda t: (ends_complete(t), f"ends {t.rstrip()[-12:]!r}")),
    (r"^is written as running text without a list", lambda t: (list_items(t) < 2, f"{list_items(t)} list items")),
    (r"^repeats the same (words|phrase|sentence)", lambda t: (repetition(t) > 0.2, f"{repetition(t):.0%} repeated word triples")),
    (r"^addresses the reader directly", lambda t: (bool(re.search(r"\byou(r|rs|rself)?\b", t.lower())), "looks for 'you'")),
    (
        r"^gives an example .*introduced by words such as",
        lambda t: (bool(re.search(r"\b(for example|for instance|such as|e\.g\.|(an|one|another) example (is|of|would))", t.lower())), "looks for 'for example'"),
    ),
]
COUNT = re.compile(r"\b(at most|at least|exactly) (\d+|" + "|".join(NUMBERS) + r") (word|sentence|item|point)s?\b")
COUNT_FRAME = re.compile(r"^(is|has|consists of|is written as|contains)\b")


def form_verdict(criterion: str, response: str) -> Verdict | None:
    """Decides criteria of form by counting; None when the criterion is about content.

    >>> form_verdict("Is at most 5 words long.", "Rest, drink and sleep.").score
    1.0
    >>> form_verdict("Is written as a list with at least three items.", "1. Rest\\n2. Drink").reason
    '2 items'
    >>> form_verdict("States that rest helps.", "Rest helps.") is None
    True
    """
    text = criterion.lower().strip()
    for pattern, check in FORMS:
        if re.search(pattern, text):
            met, reason = check(response)
            return Verdict(float(met and bool(response.strip())), reason)  # silence has no form to be praised for
    if (count := COUNT.search(text)) and COUNT_FRAME.search(text):
        bound, number, unit = count.groups()
        want = NUMBERS.get(number) or int(number)
        have = COUNTERS[unit](response)
        met = have <= want if bound == "at most" else have >= want if bound == "at least" else have == want
        return Verdict(float(met and bool(response.strip())), f"{have} {unit}s")
    return None


# ------------------------------------------------------------------------------------------- content, by overlap

PASSAGE = 3  # sentences read together; the facts of one criterion stand close to each other
COVERED = 0.4  # share of the criterion's content words that counts as "says so"
COVERED_FAULT = 0.75  # the same for a fault: an answer that merely stays on the subject shares words with its pitfalls
NEGATED = re.compile(r"^(?:the response )?(?:avoids|does not|doesn't|never|refrains from|is free of)\b\s*", re.I)


def lexical_verdict(criterion: str, response: str, covered: float = COVERED) -> Verdict:
    """The offline verdict: form counted exactly, content by word overlap, a leading negation turned round.

    covered: share of the content words that must stand in one passage (COVERED_FAULT for pitfalls).
    Returns score 1.0 or 0.0 and a reason that names the words found. COVERED and PASSAGE were chosen on 200
    statements labelled by physicians (K-QA); with the threshold chosen without the question at hand
    (leave one question out) the kappa is the same, see tests/test_judge.py.

    >>> lexical_verdict("Advises drinking water during a fever.", "With a fever, drink enough water.")
    Verdict(score=1.0, reason='3/3 content words: drink, fever, water')
    >>> lexical_verdict("Does not recommend antibiotics.", "Take antibiotics.").score
    0.0
    """
    if negation := NEGATED.match(criterion):
        inner = lexical_verdict(criterion[negation.end() :], response, covered)
        return Verdict(1 - inner.score, "not: " + inner.reason)
    if verdict := form_verdict(criterion, response):
        return verdict
    wanted = set(content_words(criterion))
    if not wanted:
        return Verdict(None, "the criterion has no content words")
    spoken = [set(content_words(s)) for s in sentences(response)]
    found: set[str] = set()
    for start in range(len(spoken)):
        passage = wanted & set().union(*spoken[start : start + PASSAGE])
        found = max(found, passage, key=len)
    share = len(found) / len(wanted)
    words = f": {', '.join(sorted(found)[:6])}" if found else ""
    return Verdict(float(share >= covered), f"{len(found)}/{len(wanted)} content words{words}")


# ------------------------------------------------------------------------------------------- how good is the judge?


def agreement(pairs: list[tuple[float | None, bool]]) -> dict:
    """Agreement of verdicts with human labels: accuracy, Cohen's kappa, macro-F1, share of missing verdicts.

    pairs: (judge's score or None, human label). Missing verdicts are counted, not guessed: they stay out of the
    other figures. Kappa is 0 for chance and 1 for identity; physicians among themselves reach 0.66-0.75 on K-QA.

    >>> agreement([(1.0, True), (1.0, True), (0.0, False), (1.0, False), (None, True)])
    {'n': 5, 'accuracy': 0.75, 'kappa': 0.5, 'macro_f1': 0.7333, 'missing': 0.2}
    """
    said = [(score >= 0.5, label) for score, label in pairs if score is not None]
    n = len(said)
    if not n:
        return {"n": len(pairs), "accuracy": None, "kappa": None, "macro_f1": None, "missing": 1.0 if pairs else 0.0}
    cell = {(a, b): sum(x == (a, b) for x in said) for a in (True, False) for b in (True, False)}
    observed = (cell[True, True] + cell[False, False]) / n
    yes_judge, yes_human = sum(a for a, _ in said) / n, sum(b for _, b in said) / n
    chance = yes_judge * yes_human + (1 - yes_judge) * (1 - yes_human)
    f1 = []
    for c in (True, False):
        denominator = 2 * cell[c, c] + cell[c, not c] + cell[not c, c]
        f1.append(2 * cell[c, c] / denominator if denominator else 0.0)
    return {
        "n": len(pairs),
        "accuracy": round(observed, 4),
        "kappa": round((observed - chance) / (1 - chance), 4) if chance < 1 else 0.0,
        "macro_f1": round(sum(f1) / 2, 4),
        "missing": round(1 - n / len(pairs), 4),
    }


def read_labels(path: str) -> list[dict]:
    """Rows with `response`, `criterion`, `met`. Raises ValueError naming file, line and what to do."""
    rows = []
    with open(path, encoding="utf8", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                raise ValueError(f"{path}:{number}: not a line of JSON") from None
            if not (isinstance(row, dict) and isinstance(row.get("met"), bool) and {"response", "criterion"} <= row.keys()):
                raise ValueError(f"{path}:{number}: needs the keys response, criterion and met (true or false)")
            rows.append(row)
    if not rows:
        raise ValueError(f"{path}: no rows; give one JSON object per line")
    return rows


def main(argv: list[str] | None = None) -> int:
    """Command line: `--agreement FILE`, or a worked example without arguments."""
    parser = argparse.ArgumentParser(description="The offline judge: a worked example, or its agreement with human labels.")
    parser.add_argument("--agreement", metavar="FILE", help="JSONL with response, criterion, met: prints one JSON line")
    args = parser.parse_args(argv)
    if args.agreement:
        try:
            rows = read_labels(args.agreement)
        except (OSError, ValueError) as error:
            print(f"judge.py: {error}", file=sys.stderr)
            return 2
        questions = [Question("", lambda r=r: lexical_verdict(r["criterion"], r["response"])) for r in rows]
        verdicts = OfflineJudge().ask(questions, progress=True)
        print(json.dumps({"judge": "offline"} | agreement([(v.score, r["met"]) for v, r in zip(verdicts, rows)])))
        return 0
    response = "Rest and drink plenty of water. If the fever lasts more than three days, see a doctor. Then you should"
    print(f"Response: {response}\n")
    for criterion in (
        "Advises drinking enough water during a fever.",
        "Advises seeing a physician if the fever lasts longer than three days.",
        "Ends with a complete sentence instead of breaking off.",
        "Is at most 40 words long.",
        "Recommends antibiotics against a viral infection.",
        "Does not recommend antibiotics.",
    ):
        verdict = lexical_verdict(criterion, response)
        print(f"  {'met    ' if verdict.score else 'not met'}  {criterion}   ({verdict.reason})")
    stuffed = "fever water drink doctor days physician three"
    print(f"\nThe same judge, fooled by stuffed words: {stuffed!r}")
    print(f"  met      ({lexical_verdict('Advises drinking enough water during a fever.', stuffed).reason})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
