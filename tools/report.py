"""What a run does, as one page and one picture: curves, when each criterion is learned, rollouts.

    pass rate of a criterion at a step  =  mean over rollouts of   s       (weight > 0)
                                                                   1 - s   (weight < 0: a fault)

s is the judge's verdict in [0, 1]; a missing verdict is left out and never counts as 0. The page
is one file that needs no network and holds no script: what models and strangers write is escaped.

    python tools/report.py RUN                          # RUN/report.html and RUN/report.png
    python tools/report.py RUN RUN RUN --out runs.png   # several, averaged over seeds
    python tools/report.py RUN --rubrics --prompt ID    # RLER: the life of the rubrics of a prompt

Reads config.json, metrics.jsonl, samples.jsonl and prompts.jsonl of the run's folder, and for RLER
the rubrics in checkpoint/trainer.pt. train.py calls `write_report` at each evaluation and
`summarise` at the end.
"""

import argparse
import gc
import html
import io
import json
import math
import os
import re
import statistics
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rar import DataError, Example, bootstrap, nanmean, satisfied

# What is worth a look in every run: is it learning, does it carry over, at what length, how far
# from where it started?
PANELS = {
    "reward": "training reward, mean of a step",
    "eval_score": "held-out score (points met / positive points)",
    "completion_tokens": "tokens of a completion",
    "kl": "KL to the starting model, per token",
}
HEAT_MAPS = {
    "train": "pass rate in training rollouts, % (of a fault: absent)",
    "heldout": "pass rate in held-out answers, % (of a fault: absent)",
}
# Settings that do not make two runs two experiments.
NOT_AN_EXPERIMENT = ("seed", "out", "resume")

MAX_COLUMNS = 48  # steps side by side in a heat map; in a longer run a column holds several
MAX_LABELS = 2000  # criteria whose pass rates are counted, so that memory has an end
MAX_ROWS = 24  # criteria in a heat map
MAX_PROMPTS = 40  # prompts of a step or an evaluation whose answers the page shows
MAX_LIVES = 60  # rubrics of a prompt whose life is drawn
MAX_CHARACTERS = 12_000  # of one text on the page
MAX_STEP = 10**9
MAX_NUMBER = 1e100

# ----------------------------------------------------------------------------- texts of strangers

# Control characters, marks that turn the direction of writing, invisible ones, line separators,
# halves of surrogate pairs. The joiners U+200C and U+200D stay: Persian, Hindi and emoji need them.
UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)


def printable(text: str) -> str:
    r"""The text with control characters spelt out, so that no terminal and no page acts on them.

    >>> printable("red: \x1b[31m, back: \u202e, not touched: é\n")
    'red: \\x1b[31m, back: \\u202e, not touched: é\n'
    """

    def spell(match: re.Match) -> str:
        # As Python writes it in a string, so that a reader can look it up.
        return match[0].encode("unicode_escape").decode("ascii")

    return UNPRINTABLE.sub(spell, text)


def markup(text: str) -> str:
    """A text as HTML: printable, escaped, and not endless.

    >>> markup("<script>")
    '&lt;script&gt;'
    """
    # A model that loops until its limit would make a page of megabytes.
    # Escaped last: what printable writes is text as well.
    shown = html.escape(printable(text[:MAX_CHARACTERS]))
    rest = len(text) - MAX_CHARACTERS
    return f"{shown} … ({rest} more characters in samples.jsonl)" if rest > 0 else shown


def shorten(text: str, limit: int) -> str:
    """The text on one line, cut at `limit` characters.

    >>> shorten("Says that rest helps", 12)
    'Says that r…'
    """
    # Cut first: joining the words of a whole book for a line of it would take a while.
    line = " ".join(printable(text[: 4 * limit]).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def score_text(value: float | None, form: str = ".3f") -> str:
    """A score for a person. What is missing is said and never shown as 0.

    >>> score_text(0.5, "+.2f"), score_text(None)
    ('+0.50', 'not scored')
    """
    # None in a log, nan in a mean of nothing.
    if value is None or math.isnan(value):
        return "not scored"
    return format(value, form)


def setting_text(value: object) -> str:
    """A setting's value; of an address neither user, password nor query, which may be secrets.

    >>> setting_text("https://me:pa/ss@host/v1?key=1"), setting_text(0.7)
    ('https://***@host/v1?***', '0.7')
    """
    text = str(value)
    if "://" in text:
        # Up to the last "@": a password may hold "/" and "@" itself.
        text = re.sub(r"//.*@", "//***@", text, flags=re.DOTALL)
        # Some services take their key in the query.
        text = re.sub(r"\?.*", "?***", text, flags=re.DOTALL)
    return text


# ----------------------------------------------------------------------------- a run's folder


def whole_lines(path: Path, offset: int = 0, number: int = 0):
    """Yields (where, bytes) of every line after `offset`, before which there are `number` lines."""
    # As bytes: read as text, a line would also end at U+2028 inside an answer.
    # One line at a time: a long run's log is gigabytes.
    with open(path, "rb") as file:
        file.seek(offset)
        for line in file:
            number += 1
            # A run may be writing the last line just now, or was killed there.
            if line.endswith(b"\n"):
                yield f"{path}:{number}", line


def parse_object(line: bytes, where: str) -> dict:
    """One JSON object. Raises DataError."""
    try:
        row = json.loads(line)
    # Bytes that are no UTF-8 raise a ValueError too; deep nesting exhausts the parser.
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise DataError(f"{where}: not one JSON object; remove that line, or restore the file")
    return row


def read_text(row: dict, key: str, where: str) -> str:
    """A text of a row, "" where there is none. Raises DataError."""
    value = row.get(key)
    # Logs of older versions lack some keys.
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where}: {key} must be a text, not {printable(repr(value)[:40])}")
    return value


def read_number(row: dict, key: str, where: str) -> float | None:
    """A number of a row; None where there is none, or none to reckon with. Raises DataError."""
    value = row.get(key)
    if value is None:
        return None
    # Not isinstance: true and false are integers in Python, but no numbers in a log.
    if type(value) not in (int, float):
        raise DataError(f"{where}: {key} must be a number, not {printable(repr(value)[:40])}")

    # What is nan, infinite or beyond any scale would leave every mean and every axis undefined.
    return value if abs(value) <= MAX_NUMBER else None


def read_step(row: dict, where: str) -> int:
    """The step of a row. Raises DataError."""
    step = row.get("step")
    # Beyond the limit no axis could be drawn; True would be taken for step 1.
    if type(step) is not int or not 0 <= step <= MAX_STEP:
        raise DataError(f"{where}: no step (a whole number from 0); is this the log of a run?")
    return step


def read_config(folder: Path) -> dict:
    """The settings of a run. Raises DataError."""
    path = folder / "config.json"
    if not path.is_file():
        raise DataError(f"{folder}: no run there (no config.json); give the folder of a run")
    return parse_object(path.read_bytes(), str(path))


def read_metrics(folder: Path) -> list[dict]:
    """The rows of metrics.jsonl: the step and what is drawn, None where missing."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise DataError(f"{folder}: no metrics.jsonl; the run has not begun yet")

    rows = []
    for where, line in whole_lines(path):
        row = parse_object(line, where)
        metrics: dict = {"step": read_step(row, where), "eval_ci": read_interval(row, where)}
        # Steps without an evaluation have no held-out score, step 0 has nothing else.
        for key in (*PANELS, "reward_std", "eval_other_score"):
            metrics[key] = read_number(row, key, where)
        rows.append(metrics)
    return rows


def read_interval(row: dict, where: str) -> tuple[float, float] | None:
    """The interval of a held-out score; None where there is none. Raises DataError."""
    ends = row.get("eval_ci")
    if not isinstance(ends, list) or len(ends) != 2:
        return None
    low = read_number({"eval_ci": ends[0]}, "eval_ci", where)
    high = read_number({"eval_ci": ends[1]}, "eval_ci", where)
    # The ends are null where a single prompt was evaluated.
    if low is None or high is None:
        return None
    return low, high


def read_prompts(folder: Path, wanted: set[str]) -> dict[str, str]:
    """Id -> prompt as text, of the prompts that are to be shown. Raises DataError."""
    rows = prompt_rows(folder, wanted)
    return {row["id"]: prompt_text(row.get("prompt"), where) for where, row in rows}


def read_questions(folder: Path, wanted: set[str]) -> dict[str, str]:
    """Id -> what the prompts of one question share (rar.Example.question_id). Raises DataError."""
    questions = {}
    for where, row in prompt_rows(folder, wanted):
        tags = row.get("tags", [])
        if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
            raise DataError(f"{where}: tags must be a list of texts")
        questions[row["id"]] = Example(row["id"], [], [], tags=tags).question_id
    return questions


def prompt_rows(folder: Path, wanted: set[str]) -> Iterator[tuple[str, dict]]:
    """(where it stands, row) of each wanted prompt in prompts.jsonl. Raises DataError."""
    path = folder / "prompts.jsonl"
    # Runs of an older version saved no prompts; their ids must do.
    if not path.is_file():
        return

    left = set(wanted)
    for where, line in whole_lines(path):
        # The file holds all prompts of a data set; a page shows a handful.
        if not left:
            break
        row = parse_object(line, where)
        name = read_text(row, "id", where)
        if name in left:
            left.remove(name)
            yield where, row


def prompt_text(messages: object, where: str) -> str:
    """Chat messages as one text. Raises DataError."""
    if not isinstance(messages, list):
        raise DataError(f"{where}: prompt must be a list of messages")
    parts = []
    for message in messages:
        if not isinstance(message, dict):
            raise DataError(f"{where}: a message must be an object with role and content")
        content = read_text(message, "content", where)
        role = read_text(message, "role", where)
        # A lone question needs no "user:" before it.
        parts.append(content if len(messages) == 1 else f"{role}: {content}")
    return "\n\n".join(parts)


# ----------------------------------------------------------------------------- rollouts


class Judged(NamedTuple):
    """One criterion's verdict on one rollout. weight < 0: a fault. score None: missing."""

    title: str
    weight: float
    score: float | None
    reason: str
    axis: str

    @property
    def satisfied(self) -> float | None:
        """The verdict turned so that 1 is right in this respect; None where it is missing."""
        # The one rule of polarity is in rar.py; it looks at the weight's sign alone.
        return None if self.score is None else satisfied(self, self.score)


class Sample(NamedTuple):
    """One rollout, as a line of samples.jsonl holds it. reward None: it was not scored."""

    step: int
    split: str  # train or heldout
    id: str
    text: str
    finish: str
    tokens: float | None
    verdicts: list[Judged]
    reward: float | None
    advantage: float | None


def read_sample(line: bytes, where: str) -> Sample:
    """A rollout from its line. Raises DataError."""
    row = parse_object(line, where)
    if row.get("split") not in ("train", "heldout"):
        raise DataError(f"{where}: split must be train or heldout; is this the log of a run?")
    # Without verdicts a row is one of another tool's: eval-*.jsonl has bare numbers there.
    listed = row.get("verdicts")
    if not isinstance(listed, list):
        raise DataError(f"{where}: verdicts must be a list; is this the log of a run?")

    return Sample(
        step=read_step(row, where),
        split=row["split"],
        id=read_text(row, "id", where),
        text=read_text(row, "text", where),
        finish=read_text(row, "finish", where),
        tokens=read_number(row, "tokens", where),
        verdicts=[read_judged(item, where) for item in listed],
        reward=read_number(row, "reward", where),
        advantage=read_number(row, "advantage", where),
    )


def read_judged(item: object, where: str) -> Judged:
    """A verdict from its object. Raises DataError."""
    if not isinstance(item, dict):
        raise DataError(f"{where}: a verdict must be an object with title, weight and score")
    weight = read_number(item, "weight", where)
    return Judged(
        title=read_text(item, "title", where),
        # The sign is all that is used of it: without one a criterion is no fault.
        weight=0.0 if weight is None else weight,
        score=read_number(item, "score", where),
        reason=read_text(item, "reason", where),
        axis=read_text(item, "axis", where),
    )


@dataclass
class PassRates:
    """Mean share of satisfied verdicts: one row per label, one column per `width` steps."""

    width: int = 1
    columns: set[int] = field(default_factory=set)  # first step of each
    cells: dict[str, dict[int, list]] = field(default_factory=dict)  # label -> column -> [sum, n]
    prompts: dict[str, set[str]] = field(default_factory=dict)  # label -> at most two prompts

    def add(self, label: str, step: int, prompt: str, value: float) -> None:
        """Counts one verdict."""
        # Where every prompt has criteria of its own, there is no end to new titles.
        if label not in self.cells and len(self.cells) >= MAX_LABELS:
            return
        column = step - step % self.width
        cell = self.cells.setdefault(label, {}).setdefault(column, [0.0, 0])
        cell[0] += value
        cell[1] += 1

        # Two prompts are enough to know that a criterion is shared.
        prompts = self.prompts.setdefault(label, set())
        if len(prompts) < 2:
            prompts.add(prompt)

        # A run of thousands of steps: neighbours merge, and memory stops growing.
        self.columns.add(column)
        while len(self.columns) > MAX_COLUMNS:
            self.merge_columns()

    def merge_columns(self) -> None:
        """Twice as many steps per column."""
        self.width *= 2
        self.columns = {column - column % self.width for column in self.columns}
        # Sums and counts add up, so nothing is lost but the resolution.
        for label, row in self.cells.items():
            merged: dict[int, list] = {}
            for column, (total, n) in row.items():
                cell = merged.setdefault(column - column % self.width, [0.0, 0])
                cell[0] += total
                cell[1] += n
            self.cells[label] = merged

    def rate(self, label: str, column: int) -> float:
        """The pass rate in one cell; nan where nothing was judged."""
        total, n = self.cells.get(label, {}).get(column, (0.0, 0))
        return total / n if n else math.nan

    def shared_labels(self) -> list[str]:
        """Labels that more than one prompt has."""
        return [label for label, prompts in self.prompts.items() if len(prompts) > 1]

    def n_verdicts(self, label: str) -> int:
        """How many verdicts stand behind a row."""
        return sum(n for _, n in self.cells.get(label, {}).values())

    def gain(self, label: str) -> float:
        """Pass rate in the row's last column minus that in its first one."""
        row = self.cells.get(label)
        # Judged in held-out answers only: it was neither learned nor lost in training.
        if not row:
            return 0.0
        return self.rate(label, max(row)) - self.rate(label, min(row))


class SampleLog:
    """samples.jsonl, streamed: pass rates of all steps, rollouts of the first and the last step.

    Its memory does not grow with the number of steps. `read_on` reads what was appended since.
    """

    def __init__(self, path: Path):
        self.begin(path)

    def begin(self, path: Path) -> None:
        """Forgets everything."""
        self.titles = {"train": PassRates(), "heldout": PassRates()}
        self.axes = {"train": PassRates(), "heldout": PassRates()}
        self.turn_to(path)

    def turn_to(self, path: Path) -> None:
        """Reads another file next. The pass rates stay: they are over seeds of an experiment."""
        self.path = path
        self.offset = 0
        self.number = 0
        self.last_line = b""
        self.rollouts: dict[str, dict[int, list[Sample]]] = {"train": {}, "heldout": {}}

    def read_on(self) -> "SampleLog":
        """Reads the lines after those that were read before. Raises DataError."""
        # Before the first evaluation there is no file yet.
        if not self.path.is_file():
            return self

        # A resumed run cuts its log back and writes on. Then the line that was read last is no
        # longer in its place, and what was counted is no longer true.
        with open(self.path, "rb") as file:
            file.seek(self.offset - len(self.last_line))
            is_same_file = file.read(len(self.last_line)) == self.last_line
        if not is_same_file:
            self.begin(self.path)

        # Counted line by line, so that a broken one leaves the state of the line before.
        for where, line in whole_lines(self.path, self.offset, self.number):
            self.count(read_sample(line, where))
            self.offset += len(line)
            self.number += 1
            self.last_line = line
        return self

    def count(self, sample: Sample) -> None:
        """Adds a rollout to the pass rates; keeps it if it is of the first or the last step."""
        for verdict in sample.verdicts:
            value = verdict.satisfied
            # A verdict that is missing says nothing about the answer.
            if value is None:
                continue
            self.titles[sample.split].add(verdict.title, sample.step, sample.id, value)
            if verdict.axis:
                self.axes[sample.split].add(verdict.axis, sample.step, sample.id, value)

        # The step that was last until now makes room.
        steps = self.rollouts[sample.split]
        if len(steps) == 2 and sample.step not in steps:
            del steps[max(steps)]
        steps.setdefault(sample.step, []).append(sample)

    def ends(self, split: str) -> list[list[Sample]]:
        """The rollouts of the first and of the last step; of one step where there is only one."""
        steps = self.rollouts[split]
        return [steps[step] for step in sorted(steps)]


# The log of the run that this process trains, so that each evaluation reads only its new lines.
OPEN_LOGS: dict[Path, SampleLog] = {}


def open_log(folder: Path) -> SampleLog:
    """The run's samples, read up to their end. Raises DataError."""
    path = (folder / "samples.jsonl").resolve()
    if path not in OPEN_LOGS:
        # One run is remembered, not every run that was ever drawn.
        OPEN_LOGS.clear()
        OPEN_LOGS[path] = SampleLog(path)
    return OPEN_LOGS[path].read_on()


def pair_answers(log: SampleLog) -> list[tuple[Sample, Sample]]:
    """First and last held-out answer to each prompt; [] before there are two evaluations."""
    ends = log.ends("heldout")
    if len(ends) < 2:
        return []
    # By id and not by place: a log may lack rows.
    answers_before = {sample.id: sample for sample in ends[0]}
    pairs = []
    for after in ends[1]:
        if after.id in answers_before:
            pairs.append((answers_before[after.id], after))
    return pairs


def gain_of(pair: tuple[Sample, Sample]) -> float:
    """Reward of the last answer minus that of the first; nan where either was not scored."""
    before, after = pair
    # Missing is never 0: it would look like a large gain or loss.
    if before.reward is None or after.reward is None:
        return math.nan
    return after.reward - before.reward


def by_gain(pairs: list[tuple[Sample, Sample]]) -> list[tuple[Sample, Sample]]:
    """The largest gain first; what was not scored comes last."""
    # Sorting with nan among the keys would leave the order to chance.
    scored = [pair for pair in pairs if not math.isnan(gain_of(pair))]
    unscored = [pair for pair in pairs if math.isnan(gain_of(pair))]
    return sorted(scored, key=gain_of, reverse=True) + unscored


# ----------------------------------------------------------------------------- drawing

BLUE = "#2f6690"
ORANGE = "#c8733a"
GREY = "#e4e6e8"
INK = "#22272b"
COLOURS = [BLUE, ORANGE, "#4f8a5b", "#8e5a9b", "#b0413e", "#6b6b6b", "#a88a2a", "#3a9aa8"]
DRAWING = {
    "text.parse_math": False,  # a title may hold dollar signs
    "svg.fonttype": "none",  # text stays text: small, and in the reader's own font
    "svg.hashsalt": "report",  # the same run gives the same page
    "font.size": 13,
    "axes.titlesize": 13,
    "axes.labelsize": 13,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa3ab",
    "axes.labelcolor": "#444b52",
    "xtick.color": "#444b52",
    "ytick.color": "#444b52",
}


@contextmanager
def drawing():
    """While it is open, figures are drawn in our style; afterwards their memory is given back."""
    # Imported here: who only wants the summary need not have it.
    import matplotlib

    # A figure is a knot of references; uncollected, each holds four megabytes. Everything older is
    # set aside meanwhile: to walk through all of torch for it would take half as long as drawing.
    gc.freeze()
    try:
        with matplotlib.rc_context(DRAWING), warnings.catch_warnings():
            # A letter that the font lacks is drawn as a box; a warning per letter helps nobody.
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            yield
        gc.collect()
    finally:
        gc.unfreeze()


def new_figure(width: float, height: float):
    """An empty figure, in inches."""
    # No pyplot: runs happen on machines without a screen.
    from matplotlib.figure import Figure

    # Constrained: long criteria and step numbers find their room by themselves.
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    return figure


@dataclass
class Experiment:
    """One line of the curves: a name, and the metrics of its seeds."""

    name: str
    seeds: list[list[dict]]

    def rows_at(self, key: str) -> dict[int, list[dict]]:
        """Step -> the rows that have this metric, one per seed; steps in order."""
        # A seed that has not come as far as the others is left out of later steps.
        rows_at: dict[int, list[dict]] = {}
        for rows in self.seeds:
            for row in rows:
                if row[key] is not None:
                    rows_at.setdefault(row["step"], []).append(row)
        return dict(sorted(rows_at.items()))


def band(rows: list[dict], key: str) -> tuple[float, float]:
    """Lower and upper edge at one step, from one row per seed.

    Of several seeds mean and standard deviation. Of a single one the reward's std within groups,
    and the 95 % interval of the held-out score.
    """
    # Population std: the seeds at hand, not an estimate for others.
    values = [row[key] for row in rows]
    mean = statistics.fmean(values)
    width = statistics.pstdev(values)
    if len(rows) == 1 and key == "reward":
        # Early rows of older versions lack it.
        width = 0.0 if rows[0]["reward_std"] is None else rows[0]["reward_std"]
    if len(rows) == 1 and key == "eval_score" and rows[0]["eval_ci"]:
        return rows[0]["eval_ci"]
    return mean - width, mean + width


def draw_curve(axes, experiment: Experiment, key: str, colour: str, style: str = "-") -> None:
    """Dots: the mean over seeds at a step. Line: its mean over five steps. Band: see `band`."""
    rows_at = experiment.rows_at(key)
    steps = list(rows_at)
    # The band shows the spread, so a dot is the mean.
    means = []
    for rows in rows_at.values():
        means.append(statistics.fmean(row[key] for row in rows))

    # Held-out scores are few, and each is a mean over all prompts already.
    window = 1 if key.startswith("eval") else 5
    smooth = []
    for end in range(1, len(means) + 1):
        smooth.append(statistics.fmean(means[max(0, end - window) : end]))
    axes.plot(steps, smooth, style, color=colour, linewidth=1.8, label=experiment.name)

    # Thousands of dots would hide the line and swell the page.
    if len(steps) <= 200:
        axes.plot(steps, means, ".", color=colour, alpha=0.45, markersize=5)
    # A seed alone has a band as well, of another meaning: see `band`.
    edges = [band(rows, key) for rows in rows_at.values()]
    lower = [edge[0] for edge in edges]
    upper = [edge[1] for edge in edges]
    axes.fill_between(steps, lower, upper, color=colour, alpha=0.13, linewidth=0)


def has_metric(experiments: list[Experiment], key: str) -> bool:
    """Whether any run has this metric."""
    return any(experiment.rows_at(key) for experiment in experiments)


def draw_panel(axes, experiments: list[Experiment], key: str) -> None:
    """One metric over the steps, one line per experiment."""
    for place, experiment in enumerate(experiments):
        draw_curve(axes, experiment, key, COLOURS[place % len(COLOURS)])
    # There is no step 2.5.
    axes.set_xlabel("step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.2)
    axes.margins(x=0.02)

    # The policy learns the taste of the judge that pays. A second judge shows what is left of the
    # gain for somebody else.
    if key != "eval_score" or not has_metric(experiments, "eval_other_score"):
        return
    if len(experiments) > 1:
        # The colour says which experiment, the dashes which judge.
        for place, experiment in enumerate(experiments):
            colour = COLOURS[place % len(COLOURS)]
            draw_curve(axes, experiment, "eval_other_score", colour, "--")
    else:
        draw_curve(axes, experiments[0], "eval_other_score", ORANGE, "--")
        handles, _ = axes.get_legend_handles_labels()
        names = ["the judge that pays", "the judge that does not"]
        axes.legend(handles, names, fontsize=11, frameon=False)


def panel_name(experiments: list[Experiment], key: str) -> str:
    """What a panel shows."""
    # Of several runs the legend names the colours, so the dashes need words.
    is_dashed = key == "eval_score" and has_metric(experiments, "eval_other_score")
    if is_dashed and len(experiments) > 1:
        return f"{PANELS[key]}; dashed: a judge that does not pay"
    return PANELS[key]


def colour_scale():
    """From nearly white to our blue: one hue, which everybody can tell apart, and print."""
    from matplotlib.colors import LinearSegmentedColormap

    shades = ["#f4f8fb", "#9fc2dc", BLUE, "#173f5f"]
    return LinearSegmentedColormap.from_list("rates", shades)


def draw_rates(axes, rates: PassRates, labels: list[str]) -> None:
    """A heat map: one row per criterion, one column per step, grey where nothing was judged."""
    columns = sorted(rates.columns)
    table = []
    for label in labels:
        table.append([rates.rate(label, column) for column in columns])
    # pcolormesh and not imshow: cells stay shapes in the page, where a picture would be blocked.
    # What is nan it leaves out, and the grey shows through.
    axes.set_facecolor(GREY)
    axes.pcolormesh(table, cmap=colour_scale(), vmin=0, vmax=1, edgecolors="white", linewidth=0.6)
    # The first row on top, as in a table.
    axes.invert_yaxis()
    if len(columns) <= 6:
        write_rates(axes, table)

    # At most seven step numbers: more would run into each other.
    places = range(0, len(columns), math.ceil(len(columns) / 7))
    axes.set_xticks([place + 0.5 for place in places])
    axes.set_xticklabels([str(columns[place]) for place in places])
    axes.set_xlabel("step" if rates.width == 1 else f"step ({rates.width} per column)")
    axes.set_yticks([row + 0.5 for row in range(len(labels))])
    axes.set_yticklabels([shorten(label, 22) for label in labels])

    # The cells are frame and ticks enough.
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def write_rates(axes, table: list[list[float]]) -> None:
    """The figures themselves, where the columns leave room for them."""
    for y, row in enumerate(table):
        for x, value in enumerate(row):
            if math.isnan(value):
                continue
            # Dark on light, light on dark.
            colour = "white" if value > 0.55 else INK
            place = (x + 0.5, y + 0.5)
            axes.text(*place, f"{100 * value:.0f}", ha="center", va="center", color=colour)


def choose_labels(log: SampleLog) -> tuple[dict[str, PassRates], list[str]]:
    """(pass rates by split, rows of the heat maps): criteria that prompts share, else axes."""
    # A criterion of one prompt is judged too rarely to show a trend.
    # Training decides which, and only where it has none do held-out answers.
    rates = log.titles
    labels = rates["train"].shared_labels() or rates["heldout"].shared_labels()
    if not labels:
        rates = log.axes
        labels = list(rates["train"].cells or rates["heldout"].cells)
    # A run on one prompt, of a version that logged no axes.
    if not labels:
        rates = log.titles
        labels = list(rates["train"].cells or rates["heldout"].cells)

    # Of many the most judged, whose rates are least noise; then what was learned stands on top.
    training = rates["train"]
    labels = sorted(labels, key=training.n_verdicts, reverse=True)[:MAX_ROWS]
    return rates, sorted(labels, key=training.gain, reverse=True)


def draw_picture(experiments: list[Experiment], log: SampleLog | None, title: str) -> bytes:
    """report.png: the four panels, and for a single run (log) its heat maps below them."""
    rates: dict[str, PassRates] = {}
    labels: list[str] = []
    if log:
        rates, labels = choose_labels(log)
    splits = [split for split in rates if labels and rates[split].columns]

    # The heat maps get the height that their rows need.
    heat_height = 1.2 + 0.27 * len(labels) if splits else 0.0
    figure = new_figure(11, 7 + heat_height)
    figure.suptitle(shorten(title, 110), fontsize=12)
    upper = figure
    if splits:
        upper, lower = figure.subfigures(2, 1, height_ratios=[7, heat_height])
        for split, axes in zip(splits, lower.subplots(1, len(splits), squeeze=False)[0]):
            axes.set_title(HEAT_MAPS[split])
            draw_rates(axes, rates[split], labels)

    for key, axes in zip(PANELS, upper.subplots(2, 2).flat):
        axes.set_title(panel_name(experiments, key))
        draw_panel(axes, experiments, key)
        # One legend is enough: the colours are the same everywhere.
        if key == "reward" and len(experiments) > 1:
            axes.legend(fontsize=9, frameon=False)

    # In memory: what cannot be drawn must not touch the picture that is there.
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=110)
    return target.getvalue()


def as_svg(figure, description: str) -> str:
    """The figure as markup that can stand inside a page."""
    # Its metadata would name the tool's address and the time of day.
    no_metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
    target = io.StringIO()
    figure.savefig(target, format="svg", metadata=no_metadata, facecolor="none")
    # The XML prologue has no place inside HTML.
    drawn = target.getvalue().partition("<svg")[2]
    return f'<figure role="img" aria-label="{markup(description)}"><svg{drawn}</figure>'


# ----------------------------------------------------------------------------- the page

# No script may run and nothing may be fetched, even if an escape were forgotten below.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
STYLE = """
:root { color-scheme: light; --ink: #22272b; --soft: #5c666f; --line: #dfe3e6; --ground: #f6f7f8 }
* { box-sizing: border-box }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: #fff;
  max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 4rem }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere }
h2 { font-size: 1.15rem; margin: 2.75rem 0 .25rem; overflow-wrap: anywhere }
h3 { font-size: 1rem; font-weight: 600; margin: 0 0 .25rem }
p { margin: .25rem 0 .75rem; max-width: 46rem; overflow-wrap: anywhere }
.soft { color: var(--soft) }
.figures { color: var(--soft); font-weight: 400; font-variant-numeric: tabular-nums }
.panels { display: grid; gap: 1.5rem 2rem; margin-top: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)) }
figure { margin: 0; min-width: 0 }
svg { display: block; width: 100%; height: auto }
svg text { font-family: system-ui, sans-serif !important }
details { border-top: 1px solid var(--line) }
details:last-of-type { border-bottom: 1px solid var(--line) }
summary { cursor: pointer; padding: .55rem 0; display: flex; flex-wrap: wrap; gap: .25rem 1rem;
  justify-content: space-between; overflow-wrap: anywhere }
summary::before { content: "+"; color: var(--soft); width: .8rem; flex: none }
details[open] > summary::before { content: "–" }
summary .name { flex: 1 1 14rem; min-width: 0 }
summary .figures { margin-left: 1.8rem }
.inside { padding: 0 0 1.25rem 1.8rem }
.said { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--ground);
  border-radius: 6px; padding: .7rem .9rem; margin: .25rem 0 1rem }
.prompt { background: none; border-left: 3px solid var(--line); border-radius: 0;
  padding: .1rem .9rem }
.pair { display: grid; gap: 0 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)) }
.pair > div { min-width: 0 }
.wide { overflow-x: auto }
.lives svg { min-width: 50rem }
table { border-collapse: collapse; font-size: .9rem; width: 100% }
.verdicts table { table-layout: fixed }
.verdicts th:first-child { width: 34% }
th { text-align: left; font-weight: 600; color: var(--soft) }
td, th { padding: .35rem .7rem .35rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; overflow-wrap: break-word }
.reason { color: var(--soft); display: block }
.good { color: #1f6b3a }
.bad { color: #a3352b }
.none { color: #7a6510 }
@media (max-width: 30rem) { .inside { padding-left: 0 } body { padding-top: 1rem } }
"""
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>{style}</style></head>
<body>
{body}
</body></html>
"""


def page(title: str, parts: list[str]) -> bytes:
    """The parts, which are markup already, as one HTML file."""
    # Only the frame is a template; texts never are, so braces in them stay braces.
    body = "\n".join(parts)
    return PAGE.format(policy=POLICY, title=markup(title), style=STYLE, body=body).encode("utf8")


def fold(name: str, figures: str, inside: list[str], is_open: bool = False) -> str:
    """Something to open. name and figures are texts, inside is markup."""
    # <details> opens and closes without a script.
    attribute = " open" if is_open else ""
    head = f'<span class="name">{markup(name)}</span>'
    head += f' <span class="figures">{markup(figures)}</span>'
    body = f'<div class="inside">{"".join(inside)}</div>'
    return f"<details{attribute}><summary>{head}</summary>{body}</details>"


def grid(figures: list[tuple[str, str]]) -> str:
    """Drawings with their names, side by side where the screen is wide enough."""
    cells = [f"<div><h3>{markup(name)}</h3>{drawn}</div>" for name, drawn in figures]
    return f'<div class="panels">{"".join(cells)}</div>'


def panel_section(experiments: list[Experiment]) -> list[str]:
    """The curves of the metrics that the runs have."""
    figures = []
    for key in PANELS:
        # A run without a reference model has no KL: no empty frame for it.
        if has_metric(experiments, key):
            name = panel_name(experiments, key)
            figure = new_figure(5.4, 3.5)
            draw_panel(figure.subplots(), experiments, key)
            figures.append((name, as_svg(figure, name)))
    return [grid(figures)]


def heat_section(log: SampleLog, title: str) -> list[str]:
    """Which criteria are learned when."""
    rates, labels = choose_labels(log)
    figures = []
    for split, name in HEAT_MAPS.items():
        # Before the first step there are held-out answers only.
        if labels and rates[split].columns:
            figure = new_figure(5.4, 1.1 + 0.29 * len(labels))
            draw_rates(figure.subplots(), rates[split], labels)
            figures.append((name, as_svg(figure, name)))
    if not figures:
        return []

    note = (
        "The share of answers that are right in this respect: light 0 %, dark 100 %, grey where "
        "nothing was judged. A fault counts as right where it is absent. What gained most in "
        "training comes first."
    )
    return [f"<h2>{markup(title)}</h2>", f'<p class="soft">{note}</p>', grid(figures)]


def verdict_text(score: float) -> str:
    """A verdict in words.

    >>> verdict_text(1.0), verdict_text(0.0), verdict_text(1 / 3)
    ('met', 'not met', 'met by 0.33')
    """
    if score == 1:
        return "met"
    if score == 0:
        return "not met"
    return f"met by {score:.2g}"


def verdict_cell(verdict: Judged) -> str:
    """What the judge says, marked by whether that is right in this respect, and its reason."""
    # A mark besides the colour: not everybody tells red from green.
    if verdict.score is None:
        kind = "none"
        text = "? missing"
    elif verdict.satisfied >= 0.5:
        kind = "good"
        text = f"✓ {verdict_text(verdict.score)}"
    else:
        kind = "bad"
        text = f"✗ {verdict_text(verdict.score)}"
    reason = f'<span class="reason">{markup(verdict.reason)}</span>'
    return f'<td><span class="{kind}">{text}</span>{reason}</td>'


def verdict_table(columns: dict[str, list[Judged]]) -> str:
    """One row per criterion, one column per answer; all answers have the same criteria."""
    heads = [f"<th>{markup(name)}</th>" for name in columns]
    rows = [f"<tr><th>criterion</th>{''.join(heads)}</tr>"]
    # The weight stands below the title: a column of its own is too much for a phone.
    for verdicts in zip(*columns.values()):
        weight = f'<span class="reason">weight {verdicts[0].weight:+.4g}</span>'
        cells = [f"<td>{markup(verdicts[0].title)}{weight}</td>"]
        cells += [verdict_cell(verdict) for verdict in verdicts]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="verdicts"><table>{"".join(rows)}</table></div>'


def answer_figures(sample: Sample) -> str:
    """Reward, length, and how the answer ended."""
    tokens = "?" if sample.tokens is None else f"{sample.tokens:.0f}"
    return f"reward {score_text(sample.reward, '+.3f')}, {tokens} tokens, {sample.finish}"


def prompt_block(prompts: dict[str, str], name: str) -> str:
    """The prompt, or its id where the run saved no prompts."""
    return f'<div class="said prompt">{markup(prompts.get(name, name))}</div>'


def prompt_name(prompts: dict[str, str], name: str) -> str:
    """The line by which a reader recognises a prompt."""
    return shorten(prompts.get(name, name), 90)


def note_left_out(n_prompts: int) -> str:
    """What the reader does not see."""
    if n_prompts <= MAX_PROMPTS:
        return ""
    return f" {n_prompts - MAX_PROMPTS} of {n_prompts} prompts are only in samples.jsonl."


def pair_section(log: SampleLog, prompts: dict[str, str]) -> list[str]:
    """First and last held-out answer to each prompt, side by side."""
    pairs = by_gain(pair_answers(log))
    if not pairs:
        return []
    # All first answers are of one step, and so are all last ones.
    first_step = pairs[0][0].step
    last_step = pairs[0][1].step
    note = f"Greedy answers at step {first_step} and step {last_step}, the largest gain first."
    parts = ["<h2>Held-out answers, first and last</h2>"]
    parts.append(f'<p class="soft">{note}{note_left_out(len(pairs))}</p>')

    # Of many both ends: who saw gains alone would believe that nothing was lost.
    if len(pairs) > MAX_PROMPTS:
        pairs = pairs[: MAX_PROMPTS // 2] + pairs[-MAX_PROMPTS // 2 :]
    for place, pair in enumerate(pairs):
        before, after = pair
        rewards = f"{score_text(before.reward)} → {score_text(after.reward)}"
        name = prompt_name(prompts, after.id)
        # The first pair is open, so that nobody has to find out how it works.
        parts.append(fold(name, rewards, pair_inside(pair, prompts), is_open=place == 0))
    return parts


def pair_inside(pair: tuple[Sample, Sample], prompts: dict[str, str]) -> list[str]:
    """The prompt, both answers, and what the judge says of each."""
    cells = []
    for sample in pair:
        figures = f'<span class="figures">{markup(answer_figures(sample))}</span>'
        head = f"<h3>step {sample.step} {figures}</h3>"
        cells.append(f'<div>{head}<div class="said">{markup(sample.text)}</div></div>')
    parts = [prompt_block(prompts, pair[1].id), f'<div class="pair">{"".join(cells)}</div>']

    # Where the rubric has changed in between, no row could hold both verdicts.
    before, after = pair
    rubrics = []
    for sample in pair:
        rubrics.append([(verdict.title, verdict.weight) for verdict in sample.verdicts])
    if rubrics[0] == rubrics[1]:
        columns = {f"step {before.step}": before.verdicts, f"step {after.step}": after.verdicts}
        parts.append(verdict_table(columns))
    else:
        for sample in pair:
            parts.append(verdict_table({f"step {sample.step}": sample.verdicts}))
    return parts


def rollout_section(samples: list[Sample], prompts: dict[str, str]) -> list[str]:
    """The rollouts of one training step: each prompt, and in it its group."""
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.id, []).append(sample)
    parts = [f"<h2>Rollouts of training step {samples[0].step}</h2>"]
    if len(groups) > MAX_PROMPTS:
        parts.append(f'<p class="soft">{note_left_out(len(groups))}</p>')

    # First the prompt: an answer cannot be read without its question.
    for name, group in list(groups.items())[:MAX_PROMPTS]:
        inside = [prompt_block(prompts, name)]
        for sample in group:
            advantage = f"advantage {score_text(sample.advantage, '+.3f')}"
            answer = f'<div class="said">{markup(sample.text)}</div>'
            verdicts = verdict_table({"verdict": sample.verdicts})
            figures = f"{advantage}, {answer_figures(sample)}"
            inside.append(fold(shorten(sample.text, 60), figures, [answer, verdicts]))
        parts.append(fold(prompt_name(prompts, name), group_figures(group), inside))
    return parts


def group_figures(group: list[Sample]) -> str:
    """Size of a group and the spread of its rewards: without spread there is nothing to learn."""
    rewards = [sample.reward for sample in group if sample.reward is not None]
    if not rewards:
        return f"{len(group)} rollouts, not scored"
    return f"{len(group)} rollouts, reward {min(rewards):.2f} to {max(rewards):.2f}"


def settings_section(config: dict) -> list[str]:
    """All settings, as the run saved them."""
    # Closed by default: who wants to repeat the run needs them all, others none.
    rows = []
    for key, value in config.items():
        rows.append(f"<tr><td>{markup(key)}</td><td>{markup(setting_text(value))}</td></tr>")
    table = f'<div class="wide"><table>{"".join(rows)}</table></div>'
    return ["<h2>Settings</h2>", fold("All settings", str(len(rows)), [table])]


# ----------------------------------------------------------------------------- one run


def write_report(run_folder: Path) -> None:
    """Writes report.html and report.png of a run into its folder. Raises DataError."""
    folder = Path(run_folder)
    write_run(folder, folder / "report.png")


def write_run(folder: Path, picture: Path) -> None:
    """Writes the picture of a run, and its page beside it. Raises DataError."""
    config = read_config(folder)
    metrics = read_metrics(folder)
    log = open_log(folder)
    steps = log.ends("train")

    # Only the prompts that are shown are looked up.
    wanted = set()
    for samples in steps + log.ends("heldout"):
        wanted.update(sample.id for sample in samples)
    prompts = read_prompts(folder, wanted)

    method = str(config.get("method", "run"))
    title = f"{method}, seed {config.get('seed', '?')}: {folder.name}"
    caption = run_caption(config)
    parts = [f"<h1>{markup(title)}</h1>", f'<p class="soft">{markup(caption)}</p>']
    for sentence in score_sentences(folder, metrics, log):
        parts.append(f"<p>{markup(sentence.replace('->', '→'))}</p>")

    experiments = [Experiment(method, [metrics])]
    with drawing():
        png = draw_picture(experiments, log, f"{title} ({caption})")
        parts += panel_section(experiments)
        parts += heat_section(log, "Which criteria are learned when")
        if method == "rler":
            parts += rubric_section(folder)

    parts += pair_section(log, prompts)
    for samples in steps:
        parts += rollout_section(samples, prompts)
    parts += settings_section(config)
    # Both are complete before either is written.
    write_file(picture, png)
    write_file(picture.with_suffix(".html"), page(title, parts))


def run_caption(config: dict) -> str:
    """Policy, judge and size of the run."""
    # Of a server the model's name says more than its address.
    judge = config.get("judge_model") or config.get("judge", "?")
    steps = f"{config.get('steps', '?')} steps of {config.get('prompts_per_step', '?')} prompts"
    size = f"{steps} x {config.get('group_size', '?')} rollouts"
    return f"{config.get('model', '?')}, judge {setting_text(judge)}, {size}"


def write_file(path: Path, content: bytes) -> None:
    """Writes aside and renames: a kill or a full disk leaves the old file. Raises DataError."""
    side = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        side.write_bytes(content)
        os.replace(side, path)
    except OSError as error:
        # The room that a half-written file takes is needed for the next checkpoint.
        with suppress(OSError):
            side.unlink()
        reason = f"cannot be written ({error.strerror}); make room or give --out"
        raise DataError(f"{path}: {reason}") from None


# ----------------------------------------------------------------------------- several runs


def line_names(configs: dict[Path, dict]) -> dict[Path, str]:
    """A name per run: the settings in which the runs differ. Seeds of an experiment share one."""
    # In the order of config.json; runs of another version may have other settings.
    keys: dict[str, None] = {}
    for config in configs.values():
        keys.update(dict.fromkeys(config))

    differing = []
    for key in keys:
        values = {str(config.get(key)) for config in configs.values()}
        if len(values) > 1 and key not in NOT_AN_EXPERIMENT:
            differing.append(key)

    names = {}
    for folder, config in configs.items():
        # "" is a default that follows from other settings: it says nothing.
        named = [key for key in differing if config.get(key, "") != ""]
        settings = [f"{key} {setting_text(config[key])}" for key in named]
        # Runs that differ in nothing but the seed are named by their method.
        names[folder] = ", ".join(settings) or str(config.get("method", folder))
    return names


def write_comparison(folders: list[Path], picture: Path) -> None:
    """Writes the curves of several runs, averaged over seeds. Raises DataError."""
    names = line_names({folder: read_config(folder) for folder in folders})
    seeds: dict[str, list[list[dict]]] = {}
    logs: dict[str, SampleLog] = {}
    for folder, name in names.items():
        seeds.setdefault(name, []).append(read_metrics(folder))

        # The heat maps of an experiment count the verdicts of all its seeds.
        path = folder / "samples.jsonl"
        log = logs.setdefault(name, SampleLog(path))
        log.turn_to(path)
        log.read_on()

    # How many seeds a line stands for decides how much it says.
    experiments = []
    for name, rows in seeds.items():
        plural = "seed" if len(rows) == 1 else "seeds"
        experiments.append(Experiment(f"{shorten(name, 60)} ({len(rows)} {plural})", rows))
    title = f"{len(names)} runs"
    with drawing():
        caption = f"{title}: mean over seeds, band of one standard deviation"
        png = draw_picture(experiments, None, caption)
        parts = [f"<h1>{title}</h1>", comparison_table(experiments)]
        parts += panel_section(experiments)
        for experiment, log in zip(experiments, logs.values()):
            parts += heat_section(log, experiment.name)
    write_file(picture, png)
    write_file(picture.with_suffix(".html"), page(title, parts))


def comparison_table(experiments: list[Experiment]) -> str:
    """First and last held-out score, mean over seeds, beside the colour of the line."""
    heads = ["held-out score", "first", "last", "std over seeds"]
    rows = ["".join(f"<th>{head}</th>" for head in heads)]
    for place, experiment in enumerate(experiments):
        # A run that was stopped counts with its last evaluation.
        first = []
        last = []
        for metrics in experiment.seeds:
            scores = [row["eval_score"] for row in metrics if row["eval_score"] is not None]
            first += scores[:1]
            last += scores[-1:]

        # The std of a single seed would be 0, as if it were certain.
        spread = score_text(statistics.pstdev(last)) if len(last) > 1 else "one seed"
        mark = f'<span style="color: {COLOURS[place % len(COLOURS)]}">■</span>'
        cells = [f"{mark} {markup(experiment.name)}"]
        cells += [score_text(nanmean(first)), score_text(nanmean(last)), spread]
        rows.append("".join(f"<td>{cell}</td>" for cell in cells))
    lines = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="wide"><table>{lines}</table></div>'


# ----------------------------------------------------------------------------- evolving rubrics


def read_buffers(folder: Path) -> dict:
    """Prompt -> rler.Buffer of the run's last checkpoint, {} without one. Raises DataError."""
    path = folder / "checkpoint" / "trainer.pt"
    if not path.is_file():
        return {}
    # Imported here: no other part of a report needs PyTorch.
    import torch

    import rler

    try:
        # mmap: the optimiser's moments, gigabytes, stay on the disk. weights_only: nothing in the
        # file can run.
        state = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
        saved = state["method"].get("buffers", {})
        return {prompt: rler.read_buffer(parts) for prompt, parts in saved.items()}
    except Exception as error:  # noqa: BLE001  (torch raises a dozen kinds for a broken file)
        reason = shorten(str(error), 200)
        raise DataError(f"{path}: not the state of a checkpoint ({reason})") from None


def lives(buffer) -> list:
    """All rubrics of a prompt: initial ones, then evolving ones in the order of their birth."""
    evolving = buffer.active + buffer.retired
    return buffer.persistent + sorted(evolving, key=lambda criterion: criterion.born)


def busiest_prompt(buffers: dict) -> str:
    """The prompt with most rubrics: it has most to show."""
    return max(buffers, key=lambda prompt: len(lives(buffers[prompt])))


def rubric_lines(prompt: str, buffer) -> list[str]:
    """Two lines per rubric: weight, text, birth and end; the std of its verdicts at each visit."""
    sizes = f"{len(buffer.persistent)} initial, {len(buffer.active)} active"
    lines = [f"{prompt}: {sizes}, {len(buffer.retired)} retired rubrics"]
    for criterion in lives(buffer):
        fate = "active"
        if criterion.retired is not None:
            fate = f"retired in step {criterion.retired}, {criterion.why}"
        # Initial ones are never retired: there is no more to say of them.
        origin = "initial"
        if criterion.born:
            origin = f"born in step {criterion.born}, {fate}"
        lines.append(f"  {criterion.weight:+.2f}  {criterion.text}  [{origin}]")

        visits = []
        for step, std in criterion.seen:
            # Where all verdicts were missing, there is no spread to speak of.
            visits.append(f"{step}: {'?' if std is None else format(std, '.2f')}")
        lines.append("         std " + "  ".join(visits))
    return [printable(line) for line in lines]


def draw_lives(axes, buffer) -> None:
    """One row per rubric, one column per step: dark where verdicts differed, x where it ended."""
    # A long run retires hundreds: the initial ones and the youngest are drawn.
    n_initial = len(buffer.persistent)
    criteria = lives(buffer)
    evolving = criteria[n_initial:]
    criteria = criteria[:n_initial] + evolving[-MAX_LIVES:]
    names = []
    for y, criterion in enumerate(criteria):
        steps = [step for step, _ in criterion.seen]
        # matplotlib leaves nan out.
        spread = [math.nan if std is None else std for _, std in criterion.seen]
        shades = {"c": spread, "cmap": "Blues", "vmin": -0.05, "vmax": 0.5}
        rows = [y] * len(steps)
        axes.scatter(steps, rows, marker="s", edgecolors="lightgray", linewidths=0.3, **shades)
        if criterion.retired is not None:
            axes.plot([criterion.retired], [y], "x", color="#b0413e", markersize=6)
        sign = "+" if criterion.weight > 0 else "-"
        names.append(f"{sign} {shorten(criterion.text, 58)}")

    # Above the line what the data set brought, below it what the run has written.
    axes.axhline(n_initial - 0.5, color="gray", linewidth=0.5)
    axes.set_yticks(range(len(criteria)), names, fontsize=11)
    axes.invert_yaxis()
    axes.set_xlabel("step")
    axes.xaxis.get_major_locator().set_params(integer=True)


def rubric_section(folder: Path) -> list[str]:
    """The life of the rubrics of one prompt, drawn."""
    buffers = read_buffers(folder)
    # A run before its first checkpoint has a page all the same.
    if not buffers:
        return []
    prompt = busiest_prompt(buffers)
    buffer = buffers[prompt]
    name = f"Life of the rubrics of {prompt}"
    note = (
        "As of the last checkpoint. Above the line the initial rubric. Dark: verdicts differ, so "
        "the criterion tells rollouts apart; x: retired. Of another prompt: python "
        "tools/report.py RUN --rubrics --prompt ID"
    )
    rows = len(buffer.persistent) + min(MAX_LIVES, len(buffer.active) + len(buffer.retired))
    figure = new_figure(11, 1.2 + 0.27 * rows)
    draw_lives(figure.subplots(), buffer)
    drawn = f'<div class="wide lives">{as_svg(figure, name)}</div>'
    return [f"<h2>{markup(name)}</h2>", f'<p class="soft">{note}</p>', drawn]


def print_rubrics(folder: Path, prompt: str) -> None:
    """--rubrics: the life of every rubric of a prompt. Raises DataError."""
    read_config(folder)
    # Whatever the method's name: rubrics that evolve have a life to tell.
    buffers = read_buffers(folder)
    if not buffers:
        advice = "give the folder of a run with --method rler"
        raise DataError(f"{folder}: no checkpoint with evolving rubrics; {advice}")
    if prompt and prompt not in buffers:
        names = ", ".join(sorted(buffers))
        raise DataError(f"--prompt {prompt}: not in this run; it has {names}")
    prompt = prompt or busiest_prompt(buffers)
    print("\n".join(rubric_lines(prompt, buffers[prompt])))


# ----------------------------------------------------------------------------- in words


def interval_text(low: float, high: float, sign: str = "") -> str:
    """A 95 % interval in words.

    >>> interval_text(0.1, 0.2, "+"), interval_text(math.nan, math.nan)
    ('95 % interval +0.100 to +0.200', 'one prompt: no interval')
    """
    # Resampling a single prompt always gives that prompt.
    if math.isnan(low):
        return "one prompt: no interval"
    return f"95 % interval {low:{sign}.3f} to {high:{sign}.3f}"


def score_sentences(folder: Path, metrics: list[dict], log: SampleLog) -> list[str]:
    """Before and after on the held-out prompts, and who says so; [] before there is an after."""
    pairs = pair_answers(log)
    if not pairs:
        return []
    # A question that is asked several times counts once, as in rar.evaluate.
    names = [last.id for _, last in pairs]
    question_of = read_questions(folder, set(names))
    questions = [question_of.get(name, name) for name in names]

    # nan, which nanmean leaves out, for what was not scored.
    before = []
    after = []
    for first, last in pairs:
        before.append(math.nan if first.reward is None else first.reward)
        after.append(math.nan if last.reward is None else last.reward)
    score_before = score_text(nanmean(question_means(before, questions)))
    score_after = score_text(nanmean(question_means(after, questions)))

    # The interval is of the gain, question by question: they differ far more among themselves than
    # one does before and after, so the intervals of the two scores overlap even where the gain is
    # certain.
    gains = question_means([gain_of(pair) for pair in pairs], questions)
    scores = f"held-out score  {score_before} -> {score_after}"
    gain = "no prompt was scored both times"
    if gains:
        interval = interval_text(*bootstrap(gains), "+")
        kind = "prompts" if len(set(questions)) == len(pairs) else "questions"
        gain = f"gain {nanmean(gains):+.3f}, {interval} ({len(gains)} {kind}, paired bootstrap)"
    return [f"{scores}   {gain}", examiner_sentence(metrics)]


def question_means(values: list[float], questions: list[str]) -> list[float]:
    """The mean of each question's values; nan counts nowhere.

    Prompts of one question are no independent values: an interval over them would be too narrow.

    >>> question_means([0.5, 1.0, math.nan, math.nan], ["a", "a", "a", "b"])
    [0.75]
    """
    values_of: dict[str, list[float]] = {}
    for value, question in zip(values, questions, strict=True):
        if not math.isnan(value):
            values_of.setdefault(question, []).append(value)
    return [statistics.fmean(values) for values in values_of.values()]


def examiner_sentence(metrics: list[dict]) -> str:
    """Whose score it is. A policy learns the taste of the judge that pays it; whether it learns
    more than that, only a judge can say that does not pay."""
    paying = [row["eval_score"] for row in metrics if row["eval_score"] is not None]
    other = [row["eval_other_score"] for row in metrics if row["eval_other_score"] is not None]
    # Two evaluations of each, or there is no before and after.
    if len(paying) < 2 or len(other) < 2:
        return "scored by the judge that pays: the payer is the examiner"
    pays = f"the judge that pays: {paying[0]:.2f} -> {paying[-1]:.2f}"
    return f"{pays}; the judge that does not: {other[0]:.2f} -> {other[-1]:.2f}"


def changed_criteria(pairs: list[tuple[Sample, Sample]]) -> list[tuple[str, float, float, int]]:
    """(title, share of satisfied verdicts before, after, prompts), the largest change first."""
    shares: dict[str, list[tuple[float, float]]] = {}
    for before, after in pairs:
        for old, new in zip(before.verdicts, after.verdicts):
            # Only what both answers were judged by can be compared.
            if old.title == new.title and old.score is not None and new.score is not None:
                shares.setdefault(new.title, []).append((old.satisfied, new.satisfied))

    changed = []
    for title, values in shares.items():
        # One prompt is no trend.
        if len(values) > 1:
            share_before = statistics.fmean(old for old, _ in values)
            share_after = statistics.fmean(new for _, new in values)
            changed.append((title, share_before, share_after, len(values)))
    return sorted(changed, key=lambda row: -abs(row[2] - row[1]))


def one_answer(folder: Path, pairs: list[tuple[Sample, Sample]]) -> list[str]:
    """The answer that gained most, before and after: an illustration, no evidence."""
    before, after = by_gain(pairs)[0]
    question = read_prompts(folder, {after.id}).get(after.id, after.id)
    return [
        "",
        "one answer, before and after",
        f"  question: {question}",
        f"  before  : {before.text.strip()}   [{score_text(before.reward, '.2f')}]",
        f"  after   : {after.text.strip()}   [{score_text(after.reward, '.2f')}]",
    ]


def summarise(run_folder: Path) -> str:
    """What a run says at its end: scores, criteria that changed, one answer. Raises DataError."""
    folder = Path(run_folder)
    metrics = read_metrics(folder)
    log = open_log(folder)
    pairs = pair_answers(log)

    lines = ["", *score_sentences(folder, metrics, log)]
    rewards = [row["reward"] for row in metrics if row["reward"] is not None]
    # With fewer steps the two means would share some.
    if len(rewards) >= 10:
        scores = f"{statistics.fmean(rewards[:5]):.3f} -> {statistics.fmean(rewards[-5:]):.3f}"
        lines.append(f"training reward {scores}   (mean of the first and of the last five steps)")

    # A handful: the page has them all.
    changed = changed_criteria(pairs)[:5]
    if changed:
        share = "share of held-out answers that are right in this respect"
        lines += ["", f"criteria that changed most ({share}):"]
    for title, before, after, n_prompts in changed:
        lines.append(f"  {title:<22} {before:4.0%} -> {after:4.0%}   ({n_prompts} prompts)")
    if pairs:
        lines += one_answer(folder, pairs)
    # It is printed to a terminal, and holds what a model wrote.
    return printable("\n".join(lines))


# ----------------------------------------------------------------------------- command line


def secrets_of(address: str) -> list[str]:
    """What a URL has that is not to be shown: user and password, and its query.

    >>> secrets_of("http://me:p@ss@host/v1?key=x"), secrets_of("me:p@host"), secrets_of("a/1:2@b")
    (['me:p@ss@', '?key=x'], ['me:p@'], [])
    """
    scheme, separator, rest = address.partition("://")
    # The last @: a password may hold others.
    login, at, host = (rest if separator else address).rpartition("@")
    # A query may hold an @ and a password a question mark: which one it is, nobody knows.
    if separator and "?" in login:
        return [rest]

    secrets = []
    # A path may hold an @ as well: without http it is one, unless it begins as a login does.
    if at and (scheme.startswith("http") or ":" in login.partition("/")[0]):
        secrets.append(login + at)
    query = host.partition("?")[2]
    if separator and query:
        secrets.append("?" + query)
    return secrets


def without_secrets(text: str, words: list[str]) -> str:
    """The text without users, passwords and queries of the URLs in a command line's words.

    >>> without_secrets("no 'http://me:p@ss@host/v1?key=x'", ["--out=http://me:p@ss@host/v1?key=x"])
    "no 'http://host/v1'"
    """
    secrets = []
    for word in map(str, words):
        # Of "--flag=URL" a message may hold the URL alone, of "URL,URL" one of them.
        for value in (word, word.partition("=")[2]):
            for address in (value, *re.split(r",(?=https?://)", value)):
                secrets += secrets_of(address)

    for secret in secrets:
        # As it stands, as messages spell control characters, and as a path.
        for spelling in (secret, printable(secret), repr(secret)[1:-1], str(Path(secret))):
            text = text.replace(spelling, "")
    return text


class Parser(argparse.ArgumentParser):
    """argparse, whose errors are one line like all others, and hold no password."""

    def parse_known_args(self, args=None, namespace=None):
        """As argparse's; keeps the words for `error`, whose messages repeat them."""
        self.words = sys.argv[1:] if args is None else args
        return super().parse_known_args(args, namespace)

    def error(self, message: str):
        """Raises DataError."""
        raise DataError(f"{without_secrets(message, self.words)}; see --help")


# A package that is not there names itself.
ERRORS = (DataError, ImportError, OSError)


def run_tool(name: str, work, argv: list[str] | None, errors: tuple = ERRORS) -> int:
    """Calls work(argv). Exit status 0, or 2 with one line on stderr for any of these errors."""
    try:
        work(argv)
        # Here and not at exit, where a full disk could no longer be reported.
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has seen enough (`| head -1`). Python must not try to write the rest at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except errors as error:
        # Whatever word was taken for a model or a file: what is printed may be kept.
        words = sys.argv[1:] if argv is None else argv
        line = " ".join(printable(without_secrets(str(error), words)).split())
        print(f"{name}: {line}", file=sys.stderr)
        return 2
    return 0


def picture_path(folders: list[Path], out: str) -> Path:
    """Where the picture goes; the page goes beside it. Raises DataError."""
    if not out:
        return folders[0] / "report.png" if len(folders) == 1 else Path("runs.png")
    path = Path(out)
    if path.suffix.lower() == ".png":
        return path
    # Who names the page means both.
    if path.suffix.lower() == ".html":
        return path.with_suffix(".png")
    # A file of somebody else is no folder to write into.
    if path.is_file():
        raise DataError(f"--out {out}: a file that is no picture; name a .png file or a folder")
    return path / "report.png"


def report(argv: list[str] | None) -> None:
    """What the command line asks for. Raises DataError."""
    parser = Parser(
        prog="report.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", nargs="+", help="the folder of a run; several are compared")
    parser.add_argument("--out", default="", help="a .png file or folder [RUN; runs.png]")
    parser.add_argument("--rubrics", action="store_true", help="RLER: print a prompt's rubrics")
    parser.add_argument("--prompt", default="", help="its id [the prompt with most rubrics]")
    args = parser.parse_args(argv)

    # The same folder twice is one run, however it is spelt.
    folders = list({Path(name).resolve(): Path(name) for name in args.run}.values())
    if args.rubrics:
        print_rubrics(folders[0], args.prompt)
        return
    picture = picture_path(folders, args.out)
    if len(folders) == 1:
        write_run(folders[0], picture)
        runs = "1 run"
    else:
        write_comparison(folders, picture)
        runs = f"{len(folders)} runs"
    print(printable(f"{runs}: {picture.with_suffix('.html')}, {picture}"))


def main(argv: list[str] | None = None) -> int:
    """Exit status 0, or 2 with one line that says what is wrong, where, and what to do."""
    return run_tool("report.py", report, argv)


if __name__ == "__main__":
    sys.exit(main())
