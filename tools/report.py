"""What a run did, as one page and one picture: curves, when each criterion is learnt, the rollouts.

    pass rate of a criterion at a step  =  mean over rollouts of  s      (weight > 0)
                                                                  1 - s  (weight < 0: a fault)

s is the judge's verdict in [0, 1]; a missing verdict is left out and never counts as 0. The page is
one file that needs no network and holds no script; whatever a model or a data set says is escaped.

    python tools/report.py RUN                           # RUN/report.html and RUN/report.png
    python tools/report.py RUN RUN RUN --out runs.png    # runs that differ in the seed alone: one line
    python tools/report.py RUN --rubrics --prompt ID     # RLER: the life of the rubrics of a prompt

Reads config.json, metrics.jsonl, samples.jsonl and prompts.jsonl in the run's folder, and for RLER
the rubrics in checkpoint/trainer.pt.
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
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rar import DataError, bootstrap, nanmean, satisfied

# What is worth a look in every run: is it learning, does it carry over, at what length, how far from
# where it started?
PANELS = {
    "reward": "training reward, mean of a step",
    "eval_score": "held-out score (points met / positive points)",
    "completion_tokens": "tokens of a completion",
    "kl": "KL to the starting model, per token",
}
# Settings that do not make two runs two experiments.
NOT_AN_EXPERIMENT = ("seed", "out", "resume")

MAX_COLUMNS = 48  # steps side by side in a heat map; in a longer run a column holds several
MAX_LABELS = 2000  # criteria whose pass rates are tracked, so that memory has an end
MAX_ROWS = 24  # criteria in a heat map
MAX_PROMPTS = 40  # prompts of a step or an evaluation whose answers the page shows
MAX_CHARACTERS = 12_000  # of one text on the page
MAX_STEP = 10**9
MAX_NUMBER = 1e100

# ---------------------------------------------------------------------------------- text that is safe

# Control characters, marks that change the direction of writing, invisible ones, line separators,
# halves of surrogate pairs. The joiners U+200C and U+200D stay: Persian, Hindi and emoji need them.
UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)


def printable(text: str) -> str:
    r"""The text with control characters spelt out: no terminal and no page acts on them.

    >>> printable("red: \x1b[31m, back: \u202e, kept: é\n")
    'red: \\x1b[31m, back: \\u202e, kept: é\n'
    """

    def spell(match: re.Match) -> str:
        return match[0].encode("unicode_escape").decode("ascii")

    return UNPRINTABLE.sub(spell, text)


def markup(text: str, limit: int = MAX_CHARACTERS) -> str:
    """A text as HTML: printable, escaped, not endless.

    >>> markup("<script>")
    '&lt;script&gt;'
    """
    shown = html.escape(printable(text[:limit]))
    if len(text) > limit:
        shown += f" … ({len(text) - limit} more characters in samples.jsonl)"
    return shown


def number_text(value: float | None, form: str = ".3f") -> str:
    """A number for a person; what is missing is said and never shown as 0."""
    if value is None or math.isnan(value):
        return "not scored"
    return format(value, form)


# ---------------------------------------------------------------------------------- a run's folder


def whole_lines(path: Path, offset: int = 0, number: int = 0):
    """Yields (where, bytes) for every whole line after `offset`, of which `number` lines come before.

    The last line is whole only with its line break: a run may be writing it, or was killed there.
    Split as bytes, because a text would also end a line at U+2028 inside an answer.
    """
    with open(path, "rb") as file:
        file.seek(offset)
        for line in file:
            number += 1
            if line.endswith(b"\n"):
                yield f"{path}:{number}", line


def parse_object(line: bytes, where: str) -> dict:
    """One JSON object. Raises DataError."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise DataError(f"{where}: not one JSON object; remove that line, or restore the file")
    return row


def read_text(row: dict, key: str, where: str) -> str:
    """A text of a row, "" where there is none. Raises DataError."""
    value = row.get(key)
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
    if type(value) not in (int, float):
        raise DataError(f"{where}: {key} must be a number, not {printable(repr(value)[:40])}")

    # What is nan, infinite or beyond any scale would leave every mean and every axis undefined.
    return value if abs(value) <= MAX_NUMBER else None


def read_step(row: dict, where: str) -> int:
    """The step of a row. Raises DataError."""
    step = row.get("step")
    if type(step) is not int or not 0 <= step <= MAX_STEP:
        raise DataError(f"{where}: no step (a whole number from 0); is this the log of a run?")
    return step


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
        return None if self.score is None else satisfied(self, self.score)


class Sample(NamedTuple):
    """One rollout, as one line of samples.jsonl holds it. reward None: it was not scored."""

    step: int
    split: str
    id: str
    text: str
    finish: str
    tokens: float | None
    verdicts: list[Judged]
    reward: float | None
    advantage: float | None


def read_sample(line: bytes, where: str) -> Sample:
    """Raises DataError for a line that is no rollout."""
    row = parse_object(line, where)
    if row.get("split") not in ("train", "heldout"):
        raise DataError(f"{where}: split must be train or heldout; is this the log of a run?")
    listed = row.get("verdicts")
    if not isinstance(listed, list):
        raise DataError(f"{where}: verdicts must be a list; is this the log of a run?")

    verdicts = []
    for item in listed:
        if not isinstance(item, dict):
            raise DataError(
                f"{where}: a verdict must be an object with title, weight and score"
            )
        verdicts.append(
            Judged(
                title=read_text(item, "title", where),
                weight=read_number(item, "weight", where) or 0.0,
                score=read_number(item, "score", where),
                reason=read_text(item, "reason", where),
                axis=read_text(item, "axis", where),
            )
        )
    return Sample(
        step=read_step(row, where),
        split=row["split"],
        id=read_text(row, "id", where),
        text=read_text(row, "text", where),
        finish=read_text(row, "finish", where),
        tokens=read_number(row, "tokens", where),
        verdicts=verdicts,
        reward=read_number(row, "reward", where),
        advantage=read_number(row, "advantage", where),
    )


def read_config(folder: Path) -> dict:
    """The settings of a run. Raises DataError."""
    path = folder / "config.json"
    if not path.is_file():
        raise DataError(f"{folder}: no run there (no config.json); give the folder of a run")
    return parse_object(path.read_bytes(), str(path))


def read_metrics(folder: Path) -> list[dict]:
    """The rows of metrics.jsonl: a step, and of the panels' figures those that are numbers."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise DataError(f"{folder}: no metrics.jsonl; the run has not begun yet")
    keys = [*PANELS, "reward_std", "eval_other_score"]

    rows = []
    for where, line in whole_lines(path):
        row = parse_object(line, where)
        metrics = {"step": read_step(row, where)}
        for key in keys:
            metrics[key] = read_number(row, key, where)
        metrics["eval_ci"] = read_interval(row, where)
        rows.append(metrics)
    return rows


def read_interval(row: dict, where: str) -> tuple[float, float] | None:
    """The interval of a held-out score; None where there is none, as with a single prompt."""
    ends = row.get("eval_ci")
    if not isinstance(ends, list) or len(ends) != 2:
        return None
    low = read_number({"eval_ci": ends[0]}, "eval_ci", where)
    high = read_number({"eval_ci": ends[1]}, "eval_ci", where)
    return None if low is None or high is None else (low, high)


def read_prompts(folder: Path, wanted: set[str]) -> dict[str, str]:
    """Id -> prompt as text, of the prompts that are to be shown; runs of an old version have none."""
    prompts: dict[str, str] = {}
    path = folder / "prompts.jsonl"
    if not path.is_file():
        return prompts

    for where, line in whole_lines(path):
        row = parse_object(line, where)
        name = read_text(row, "id", where)
        if name in wanted:
            prompts[name] = prompt_text(row.get("prompt"), where)
            if len(prompts) == len(wanted):
                break
    return prompts


def prompt_text(messages: object, where: str) -> str:
    """Chat messages as text; the role only where there are several. Raises DataError."""
    if not isinstance(messages, list):
        raise DataError(f"{where}: prompt must be a list of messages")
    parts = []
    for message in messages:
        if not isinstance(message, dict):
            raise DataError(f"{where}: a message must be an object with role and content")
        content = read_text(message, "content", where)
        role = read_text(message, "role", where)
        parts.append(content if len(messages) == 1 else f"{role}: {content}")
    return "\n\n".join(parts)


# ---------------------------------------------------------------------------------- pass rates


@dataclass
class PassRates:
    """Mean share of good verdicts, one row per label, one column per `width` steps.

    A run of thousands of steps keeps at most MAX_COLUMNS columns: when there are more, neighbours
    are merged and every column holds twice as many steps.
    """

    width: int = 1
    columns: set[int] = field(default_factory=set)
    cells: dict[str, dict[int, list]] = field(
        default_factory=dict
    )  # label -> column -> [sum, n]
    prompts: dict[str, set[str]] = field(default_factory=dict)  # label -> the first two prompts

    def add(self, label: str, step: int, prompt: str, value: float) -> None:
        """Counts one verdict."""
        if label not in self.cells and len(self.cells) >= MAX_LABELS:
            return
        row = self.cells.setdefault(label, {})
        column = step - step % self.width
        cell = row.setdefault(column, [0.0, 0])
        cell[0] += value
        cell[1] += 1

        # Two prompts are enough to know that a criterion is shared.
        prompts = self.prompts.setdefault(label, set())
        if len(prompts) < 2:
            prompts.add(prompt)

        self.columns.add(column)
        while len(self.columns) > MAX_COLUMNS:
            self.merge_columns()

    def merge_columns(self) -> None:
        """Twice as many steps per column."""
        self.width *= 2
        self.columns = {column - column % self.width for column in self.columns}
        for label, row in self.cells.items():
            merged: dict[int, list] = {}
            for column, (total, n) in row.items():
                cell = merged.setdefault(column - column % self.width, [0.0, 0])
                cell[0] += total
                cell[1] += n
            self.cells[label] = merged

    def shared_labels(self) -> list[str]:
        """Labels that more than one prompt has."""
        return [label for label, prompts in self.prompts.items() if len(prompts) > 1]

    def n_verdicts(self, label: str) -> int:
        """How many verdicts stand behind a row."""
        return sum(n for _, n in self.cells.get(label, {}).values())

    def gain(self, label: str) -> float:
        """Pass rate in the last column minus that in the first one; 0 for a single column."""
        row = self.cells.get(label)
        if not row:
            return 0.0
        first, last = row[min(row)], row[max(row)]
        return last[0] / last[1] - first[0] / first[1]


class SampleLog:
    """samples.jsonl, streamed: the pass rates of all steps, the rollouts of the first and the last.

    Memory does not grow with the number of steps, and `read_on` reads only what was appended since.
    """

    def __init__(self, path: Path):
        self.begin(path)

    def begin(self, path: Path) -> None:
        """Forgets everything."""
        self.titles = {"train": PassRates(), "heldout": PassRates()}
        self.axes = {"train": PassRates(), "heldout": PassRates()}
        self.turn_to(path)

    def turn_to(self, path: Path) -> None:
        """Reads another file next. The pass rates stay: they are over all seeds of an experiment."""
        self.path = path
        self.offset = 0
        self.number = 0
        self.last_line = b""
        self.rollouts: dict[str, dict[int, list[Sample]]] = {"train": {}, "heldout": {}}

    def read_on(self) -> "SampleLog":
        """Reads the lines after those that were read before. Raises DataError."""
        if not self.path.is_file():
            return self
        # A resumed run cuts its log back and writes on. Then the line that was read last is no
        # longer at its place, and what was counted is no longer true.
        with open(self.path, "rb") as file:
            file.seek(self.offset - len(self.last_line))
            if file.read(len(self.last_line)) != self.last_line:
                self.begin(self.path)

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
            if value is None:
                continue
            self.titles[sample.split].add(verdict.title, sample.step, sample.id, value)
            if verdict.axis:
                self.axes[sample.split].add(verdict.axis, sample.step, sample.id, value)

        steps = self.rollouts[sample.split]
        if len(steps) == 2 and sample.step not in steps:
            del steps[max(steps)]
        steps.setdefault(sample.step, []).append(sample)

    def ends(self, split: str) -> tuple[list[Sample], list[Sample]]:
        """Rollouts of the first and of the last step; the same ones where there is only one step."""
        steps = self.rollouts[split]
        if not steps:
            return [], []
        return steps[min(steps)], steps[max(steps)]


# The log of the run that this process trains, so that each evaluation reads only the new lines.
OPEN_LOGS: dict[Path, SampleLog] = {}


def open_log(folder: Path) -> SampleLog:
    """The run's samples, read up to their end. One run is remembered, not every run ever drawn."""
    path = (folder / "samples.jsonl").resolve()
    if path not in OPEN_LOGS:
        OPEN_LOGS.clear()
        OPEN_LOGS[path] = SampleLog(path)
    return OPEN_LOGS[path].read_on()


# ---------------------------------------------------------------------------------- drawing

BLUE = "#2f6690"
ORANGE = "#c8733a"
GREY = "#e4e6e8"
COLOURS = [BLUE, ORANGE, "#4f8a5b", "#8e5a9b", "#b0413e", "#6b6b6b", "#a88a2a", "#3a9aa8"]
DRAWING = {
    "text.parse_math": False,  # a title may hold a dollar sign
    "svg.fonttype": "none",  # text stays text: small, and the reader's own font
    "svg.hashsalt": "report",
    "path.simplify": True,
    "font.size": 13,
    "axes.titlesize": 13,
    "axes.labelsize": 13,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa3ab",
    "axes.labelcolor": "#444b52",
    "xtick.color": "#444b52",
    "ytick.color": "#444b52",
    "axes.titlecolor": "#22272b",
}


@dataclass
class Line:
    """One line of the curves: a name, and the metrics of its seeds."""

    name: str
    seeds: list[list[dict]]


def band(rows: list[dict], key: str) -> tuple[float, float]:
    """Lower and upper edge at one step, from one row per seed: mean and standard deviation over seeds.

    Of a single seed: the reward's std within groups, and the 95 % interval of the held-out score.
    """
    values = [row[key] for row in rows]
    middle = statistics.fmean(values)
    width = statistics.pstdev(values)
    if len(rows) == 1 and key == "reward":
        width = rows[0]["reward_std"] or 0.0
    if len(rows) == 1 and key == "eval_score" and rows[0]["eval_ci"]:
        return rows[0]["eval_ci"]
    return middle - width, middle + width


def draw_curve(
    axes, line: Line, key: str, colour: str, style: str = "-", name: str = ""
) -> None:
    """Dots: the mean over seeds at a step. Line: its mean over five steps. Band: see `band`."""
    rows_at: dict[int, list[dict]] = {}
    for rows in line.seeds:
        for row in rows:
            if row[key] is not None:
                rows_at.setdefault(row["step"], []).append(row)
    steps = sorted(rows_at)
    if not steps:
        return

    # Held-out scores are few and each is a mean over all prompts: they are not smoothed.
    window = 1 if key.startswith("eval") else 5
    values = []
    for step in steps:
        values.append(statistics.fmean(row[key] for row in rows_at[step]))
    smooth = []
    for place in range(len(values)):
        smooth.append(statistics.fmean(values[max(0, place + 1 - window) : place + 1]))
    axes.plot(steps, smooth, style, color=colour, linewidth=1.8, label=name or line.name)

    # Thousands of dots would hide the line and swell the page.
    if len(steps) <= 200:
        axes.plot(steps, values, ".", color=colour, alpha=0.45, markersize=5)
    edges = [band(rows_at[step], key) for step in steps]
    lower = [edge[0] for edge in edges]
    upper = [edge[1] for edge in edges]
    axes.fill_between(steps, lower, upper, color=colour, alpha=0.13, linewidth=0)


def has_values(lines: list[Line], key: str) -> bool:
    """Whether any run has this metric."""
    return any(row[key] is not None for line in lines for rows in line.seeds for row in rows)


def draw_panel(axes, lines: list[Line], key: str) -> None:
    """One metric over the steps, one line per experiment."""
    for place, line in enumerate(lines):
        colour = COLOURS[place % len(COLOURS)]
        draw_curve(axes, line, key, colour)
    axes.set_xlabel("step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.2)
    axes.margins(x=0.02)

    # The judge that pays is the one whose taste the policy learns; a second one shows what is left
    # of the gain for somebody else.
    if key == "eval_score" and has_values(lines, "eval_other_score"):
        for place, line in enumerate(lines):
            colour = ORANGE if len(lines) == 1 else COLOURS[place % len(COLOURS)]
            draw_curve(
                axes, line, "eval_other_score", colour, "--", f"{line.name}, other judge"
            )
        if len(lines) == 1:
            handles, _ = axes.get_legend_handles_labels()
            names = ["the judge that pays", "the judge that does not"]
            axes.legend(handles, names, fontsize=11, frameon=False)


def colour_scale():
    """From nearly white to our blue: one hue, readable by everyone and in print."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("rates", ["#f4f8fb", "#9fc2dc", BLUE, "#173f5f"])


def draw_rates(axes, rates: PassRates, labels: list[str]) -> None:
    """A heat map: one row per criterion, one column per step; grey where nothing was judged."""
    columns = sorted(rates.columns)
    table = []
    for label in labels:
        row = []
        for column in columns:
            total, n = rates.cells.get(label, {}).get(column, (0.0, 0))
            row.append(total / n if n else math.nan)
        table.append(row)
    axes.set_facecolor(GREY)
    axes.pcolormesh(
        table, cmap=colour_scale(), vmin=0, vmax=1, edgecolors="white", linewidth=0.6
    )
    axes.invert_yaxis()

    # Few columns leave room for the figures themselves.
    if len(columns) <= 6:
        for y, row in enumerate(table):
            for x, value in enumerate(row):
                if not math.isnan(value):
                    colour = "white" if value > 0.55 else "#22272b"
                    text = f"{100 * value:.0f}"
                    axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", color=colour)

    # At most seven step numbers: more would run into each other.
    stride = math.ceil(len(columns) / 7)
    places = range(0, len(columns), stride)
    axes.set_xticks(
        [place + 0.5 for place in places], [str(columns[place]) for place in places]
    )
    axes.set_xlabel("step" if rates.width == 1 else f"step ({rates.width} per column)")
    rows = range(len(labels))
    names = [shorten(label, 22) for label in labels]
    axes.set_yticks([row + 0.5 for row in rows], names)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def shorten(text: str, limit: int) -> str:
    """The text on one line, cut at `limit` characters.

    >>> shorten("Says that rest helps", 12)
    'Says that r…'
    """
    text = " ".join(printable(text).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def choose_labels(log: SampleLog) -> tuple[dict[str, PassRates], list[str]]:
    """(pass rates by split, rows of the heat map): criteria that several prompts share, else axes.

    A criterion of one prompt is judged too rarely to show a trend. Of many the most judged are
    taken, and those that gained most come first.
    """
    rates = log.titles
    labels = rates["train"].shared_labels() or rates["heldout"].shared_labels()
    if not labels:
        rates = log.axes
        labels = list(rates["train"].cells or rates["heldout"].cells)
    if not labels:
        rates = log.titles
        labels = list(rates["train"].cells)

    labels = sorted(labels, key=lambda label: -rates["train"].n_verdicts(label))[:MAX_ROWS]
    labels = sorted(labels, key=lambda label: -rates["train"].gain(label))
    return rates, labels


HEAT_MAPS = {
    "train": "pass rate in training rollouts, %",
    "heldout": "pass rate in held-out answers, %",
}


def new_figure(width: float, height: float):
    """A figure without a screen: runs happen on machines that have none, so no pyplot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    return figure


def draw_picture(lines: list[Line], log: SampleLog | None, title: str) -> bytes:
    """report.png: the four panels, and below them the heat maps of a single run."""
    rates, labels = choose_labels(log) if log else ({}, [])
    shown = [split for split in HEAT_MAPS if labels and rates[split].columns]
    heat_height = 1.2 + 0.27 * len(labels) if shown else 0.0
    figure = new_figure(11, 7 + heat_height)
    figure.suptitle(shorten(title, 110), fontsize=12)
    if shown:
        upper, lower = figure.subfigures(2, 1, height_ratios=[7, heat_height])
    else:
        upper, lower = figure, None

    for (key, name), axes in zip(PANELS.items(), upper.subplots(2, 2).flat):
        axes.set_title(name)
        draw_panel(axes, lines, key)
        if key == "reward" and len(lines) > 1:
            axes.legend(fontsize=9, frameon=False)
    if shown:
        maps = lower.subplots(1, len(shown), squeeze=False)[0]
        for split, axes in zip(shown, maps):
            axes.set_title(HEAT_MAPS[split])
            draw_rates(axes, rates[split], labels)

    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=110)
    return target.getvalue()


def as_svg(figure, description: str) -> str:
    """The figure as markup to stand inside a page."""
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    target = io.StringIO()
    figure.savefig(target, format="svg", metadata=nothing, facecolor="none")
    text = target.getvalue()
    # Without the XML prologue, which has no place inside HTML.
    drawn = text[text.index("<svg") :]
    return f'<figure role="img" aria-label="{markup(description)}">{drawn}</figure>'


# ---------------------------------------------------------------------------------- the page

# No script may run and nothing may be fetched: the page holds what models and strangers wrote.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
STYLE = """
:root { color-scheme: light; --ink: #22272b; --soft: #5c666f; --line: #dfe3e6; --ground: #f6f7f8 }
* { box-sizing: border-box }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: #fff;
  max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 4rem }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere }
h2 { font-size: 1.15rem; margin: 2.75rem 0 .25rem }
h3 { font-size: 1rem; margin: 0 0 .25rem; font-weight: 600 }
p { margin: .25rem 0 .75rem; max-width: 46rem }
.soft { color: var(--soft) }
.panels { display: grid; gap: 1.5rem 2rem; margin-top: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)) }
figure { margin: 0; min-width: 0 } svg { display: block; width: 100%; height: auto }
svg text { font-family: system-ui, sans-serif !important }
details { border-top: 1px solid var(--line) } details:last-of-type { border-bottom: 1px solid var(--line) }
summary { cursor: pointer; padding: .55rem 0; display: flex; gap: .25rem 1rem; flex-wrap: wrap;
  justify-content: space-between; overflow-wrap: anywhere }
summary::before { content: "+"; color: var(--soft); width: .8rem; flex: none }
details[open] > summary::before { content: "–" }
summary .name { flex: 1 1 14rem; min-width: 0 } summary .figures { margin-left: 1.8rem }
.figures { color: var(--soft); font-weight: 400; font-variant-numeric: tabular-nums }
.inside { padding: 0 0 1.25rem 1.8rem }
.said { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--ground);
  border-radius: 6px; padding: .7rem .9rem; margin: .25rem 0 1rem }
.prompt { background: none; border-left: 3px solid var(--line); border-radius: 0; padding: .1rem .9rem }
.pair { display: grid; gap: 0 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)) }
.pair > div { min-width: 0 }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem; width: 100% }
.verdicts table { table-layout: fixed } .verdicts th:first-child { width: 34% }
th { text-align: left; font-weight: 600; color: var(--soft) }
td, th { padding: .35rem .7rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere }
.good { color: #1f6b3a } .bad { color: #a3352b } .none { color: #7a6510 }
.reason { color: var(--soft); display: block }
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


def page(title: str, parts: list[str]) -> str:
    """The parts, which are markup already, as one HTML file."""
    body = "\n".join(parts)
    return PAGE.format(policy=POLICY, title=markup(title), style=STYLE, body=body)


def fold(name: str, figures: str, inside: list[str], is_open: bool = False) -> str:
    """Something to open. name and figures are texts; inside is markup."""
    attribute = " open" if is_open else ""
    head = f'<span class="name">{markup(name)}</span> <span class="figures">{markup(figures)}</span>'
    body = "\n".join(inside)
    return f'<details{attribute}><summary>{head}</summary><div class="inside">{body}</div></details>'


def verdict_cell(verdict: Judged) -> str:
    """What the judge says, marked by whether that is right in this respect; then its reason."""
    if verdict.score is None:
        kind = "none"
        mark = "? missing"
    elif verdict.satisfied >= 0.5:
        kind = "good"
        mark = f"✓ {verdict_text(verdict.score)}"
    else:
        kind = "bad"
        mark = f"✗ {verdict_text(verdict.score)}"
    reason = f'<span class="reason">{markup(verdict.reason)}</span>'
    return f'<td><span class="{kind}">{mark}</span>{reason}</td>'


def verdict_text(score: float) -> str:
    """A verdict in words where it is a clear one.

    >>> verdict_text(1.0), verdict_text(0.0), verdict_text(1 / 3)
    ('met', 'not met', 'met by 0.33')
    """
    if score in (0, 1):
        return "met" if score else "not met"
    return f"met by {score:.2g}"


def verdict_table(columns: dict[str, list[Judged]]) -> str:
    """One row per criterion, one column of verdicts per answer. All answers have the same criteria."""
    heads = "".join(f"<th>{markup(name)}</th>" for name in columns)
    rows = [f"<tr><th>criterion</th>{heads}</tr>"]
    for verdicts in zip(*columns.values()):
        first = verdicts[0]
        cells = "".join(verdict_cell(verdict) for verdict in verdicts)
        weight = f'<span class="reason">weight {first.weight:+.4g}</span>'
        rows.append(f"<tr><td>{markup(first.title)}{weight}</td>{cells}</tr>")
    return f'<div class="verdicts"><table>{"".join(rows)}</table></div>'


def rubric_of(sample: Sample) -> list[tuple[str, float]]:
    """What the sample was judged by."""
    return [(verdict.title, verdict.weight) for verdict in sample.verdicts]


def prompt_block(prompts: dict[str, str], name: str) -> str:
    """The prompt, or its id where the run did not save its prompts."""
    return f'<div class="said prompt">{markup(prompts.get(name, name))}</div>'


def prompt_name(prompts: dict[str, str], name: str) -> str:
    """The line by which a reader recognises a prompt."""
    return shorten(prompts.get(name, name), 90)


def answer_figures(sample: Sample) -> str:
    """Reward, length and how the answer ended."""
    tokens = number_text(sample.tokens, ".0f")
    return f"reward {number_text(sample.reward, '+.3f')}, {tokens} tokens, {sample.finish}"


def pair_section(log: SampleLog, prompts: dict[str, str]) -> list[str]:
    """First and last held-out answer of every prompt side by side, the largest gain first."""
    first, last = log.ends("heldout")
    if not first:
        return []
    answers_before = {sample.id: sample for sample in first}
    pairs = []
    for after in last:
        before = answers_before.get(after.id)
        if before is not None:
            pairs.append((before, after, gain_of(before, after)))
    # What could not be scored comes last: nan would leave the order to chance.
    pairs.sort(key=lambda pair: math.inf if math.isnan(pair[2]) else -pair[2])

    steps = f"step {first[0].step} and step {last[0].step}"
    parts = ["<h2>Held-out answers, first and last</h2>"]
    parts.append(
        f'<p class="soft">Greedy answers at {steps}, the largest gain first.{left_out(len(pairs))}</p>'
    )
    for before, after, gain in pairs[:MAX_PROMPTS]:
        name = prompt_name(prompts, after.id)
        figures = f"{number_text(before.reward)} → {number_text(after.reward)}"
        # The first pair stands open, so that a reader sees an answer without a click.
        parts.append(fold(name, figures, pair_inside(before, after, prompts), len(parts) == 2))
    return parts


def gain_of(before: Sample, after: Sample) -> float:
    """Reward after minus reward before; nan where either was not scored."""
    if before.reward is None or after.reward is None:
        return math.nan
    return after.reward - before.reward


def left_out(n: int) -> str:
    """What the reader does not see."""
    return f" {n - MAX_PROMPTS} of {n} prompts are not shown." if n > MAX_PROMPTS else ""


def pair_inside(before: Sample, after: Sample, prompts: dict[str, str]) -> list[str]:
    """The prompt, both answers, and what the judge said of each."""
    cells = []
    for sample in (before, after):
        head = f'<h3>step {sample.step} <span class="figures">{markup(answer_figures(sample))}</span></h3>'
        cells.append(f'<div>{head}<div class="said">{markup(sample.text)}</div></div>')
    parts = [prompt_block(prompts, after.id), f'<div class="pair">{"".join(cells)}</div>']

    # Evolving rubrics may have changed in between; then no row holds both verdicts.
    if rubric_of(before) == rubric_of(after):
        columns = {
            f"step {before.step}": before.verdicts,
            f"step {after.step} ": after.verdicts,
        }
        parts.append(verdict_table(columns))
    else:
        parts.append(verdict_table({f"step {before.step}": before.verdicts}))
        parts.append(verdict_table({f"step {after.step}": after.verdicts}))
    return parts


def rollout_section(samples: list[Sample], prompts: dict[str, str]) -> list[str]:
    """The rollouts of one training step, by prompt: first the prompt, then its group."""
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.id, []).append(sample)

    parts = [f"<h2>Rollouts of training step {samples[0].step}</h2>"]
    if len(groups) > MAX_PROMPTS:
        parts.append(f'<p class="soft">{left_out(len(groups))}</p>')
    for name in list(groups)[:MAX_PROMPTS]:
        inside = [prompt_block(prompts, name)]
        for sample in groups[name]:
            figures = (
                f"advantage {number_text(sample.advantage, '+.3f')}, {answer_figures(sample)}"
            )
            shown = [f'<div class="said">{markup(sample.text)}</div>']
            shown.append(verdict_table({"verdict": sample.verdicts}))
            inside.append(fold(shorten(sample.text, 60), figures, shown))

        rewards = [sample.reward for sample in groups[name] if sample.reward is not None]
        spread = "not scored"
        if rewards:
            spread = (
                f"{len(groups[name])} rollouts, reward {min(rewards):.2f} to {max(rewards):.2f}"
            )
        parts.append(fold(prompt_name(prompts, name), spread, inside))
    return parts


def settings_section(config: dict) -> str:
    """All settings, as the run saved them."""
    rows = []
    for key, value in config.items():
        rows.append(
            f"<tr><td>{markup(str(key))}</td><td>{markup(setting_text(key, value))}</td></tr>"
        )
    table = f'<div class="wide"><table>{"".join(rows)}</table></div>'
    return fold("All settings", f"{len(rows)}", [table])


def setting_text(key: str, value: object) -> str:
    """A setting's value; of the judge's address neither user, password nor query: these are secrets.

    >>> setting_text("judge", "https://me:pa/ss@host/v1?key=1")
    'https://***@host/v1?***'
    """
    text = str(value)
    if key == "judge":
        text = re.sub(r"//.*@", "//***@", text, flags=re.DOTALL)
        text = re.sub(r"\?.*", "?***", text, flags=re.DOTALL)
    return text


def panel_figures(lines: list[Line]) -> list[str]:
    """The curves that have values, each as a figure of the page."""
    figures = []
    for key, name in PANELS.items():
        if not has_values(lines, key):
            continue
        figure = new_figure(5.4, 3.6)
        draw_panel(figure.subplots(), lines, key)
        figures.append(f"<div><h3>{markup(name)}</h3>{as_svg(figure, name)}</div>")
    return figures


def heat_section(log: SampleLog) -> list[str]:
    """Which criteria are learnt when."""
    rates, labels = choose_labels(log)
    figures = []
    for split, name in HEAT_MAPS.items():
        if labels and rates[split].columns:
            figure = new_figure(5.4, 1.1 + 0.29 * len(labels))
            draw_rates(figure.subplots(), rates[split], labels)
            figures.append(f"<div><h3>{markup(name)}</h3>{as_svg(figure, name)}</div>")
    if not figures:
        return []
    note = (
        "The share of answers that are right in this respect: light 0 %, dark 100 %, grey where nothing "
        "was judged. A fault counts as right where it is absent. What gained most in training comes first."
    )
    grid = f'<div class="panels">{"".join(figures)}</div>'
    return ["<h2>Which criteria are learnt when</h2>", f'<p class="soft">{note}</p>', grid]


# ---------------------------------------------------------------------------------- one run


def run_title(config: dict, folder: Path) -> str:
    """What the run is, in one line."""
    return f"{config.get('method', 'run')}, seed {config.get('seed', '?')}: {folder.name}"


def run_caption(config: dict) -> str:
    """Policy, judge and size of the run."""
    judge = config.get("judge_model") or setting_text("judge", config.get("judge", "?"))
    size = f"{config.get('prompts_per_step', '?')} prompts x {config.get('group_size', '?')} rollouts"
    return (
        f"{config.get('model', '?')}, judge {judge}, {config.get('steps', '?')} steps of {size}"
    )


def write_report(run_folder: Path) -> None:
    """Writes report.html and report.png of a run into its folder. Raises DataError."""
    write_run_report(Path(run_folder), Path(run_folder) / "report.png")


def write_run_report(folder: Path, picture: Path) -> None:
    """The page stands beside the picture, under the same name. Raises DataError."""
    config = read_config(folder)
    metrics = read_metrics(folder)
    log = open_log(folder)
    lines = [Line(str(config.get("method", folder.name)), [metrics])]

    first, last = log.ends("train")
    answers, _ = log.ends("heldout")
    wanted = {sample.id for sample in [*first, *last, *answers]}
    prompts = read_prompts(folder, wanted)

    title = run_title(config, folder)
    with drawing():
        png = draw_picture(lines, log, f"{title} ({run_caption(config)})")
        parts = [
            f"<h1>{markup(title)}</h1>",
            f'<p class="soft">{markup(run_caption(config))}</p>',
        ]
        for sentence in score_sentences(metrics, log):
            parts.append(f"<p>{markup(sentence.replace('->', '→'))}</p>")
        parts.append(f'<div class="panels">{"".join(panel_figures(lines))}</div>')
        parts += heat_section(log)
        parts += rubric_section(folder, config)
    parts += pair_section(log, prompts)
    for samples in (first, last):
        if samples and (samples is first or last is not first):
            parts += rollout_section(samples, prompts)
    parts += ["<h2>Settings</h2>", settings_section(config)]
    write_file(picture, png)
    write_file(picture.with_suffix(".html"), page(title, parts).encode("utf8"))


class drawing:
    """While it is open, figures are drawn in our style; afterwards their memory is given back."""

    def __enter__(self):
        import matplotlib

        self.style = matplotlib.rc_context(DRAWING)
        self.style.__enter__()
        # A letter that the font lacks is drawn as a box; a line per letter on the terminal helps nobody.
        self.quiet = warnings.catch_warnings()
        self.quiet.__enter__()
        warnings.filterwarnings("ignore", message="Glyph .* missing from")

    def __exit__(self, *error):
        self.quiet.__exit__(*error)
        self.style.__exit__(*error)
        # A figure is a knot of references; uncollected, each holds four megabytes.
        gc.collect()


def write_file(path: Path, content: bytes) -> None:
    """Written aside and renamed: a kill or a full disk leaves the old file. Raises DataError."""
    side = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        side.write_bytes(content)
        os.replace(side, path)
    except OSError as error:
        # The room that the half-written file takes is needed for the checkpoint.
        with suppress(OSError):
            side.unlink()
        raise DataError(
            f"{path}: cannot be written ({error.strerror}); make room or give --out"
        ) from None


# ---------------------------------------------------------------------------------- several runs


def line_names(configs: dict[Path, dict]) -> dict[Path, str]:
    """A name per run: the settings in which the runs differ. Runs of one name differ in the seed alone."""
    keys: list[str] = []
    for config in configs.values():
        keys += [key for key in config if key not in keys and key not in NOT_AN_EXPERIMENT]
    differing = []
    for key in keys:
        values = {str(config.get(key)) for config in configs.values()}
        if len(values) > 1:
            differing.append(key)

    names = {}
    for folder, config in configs.items():
        settings = [key for key in differing if config.get(key, "") != ""]
        parts = [f"{key} {setting_text(key, config[key])}" for key in settings]
        names[folder] = ", ".join(parts) or str(config.get("method", folder))
    return names


def write_comparison(folders: list[Path], picture: Path) -> None:
    """Curves of several runs: mean and band over the seeds of each experiment. Raises DataError."""
    names = line_names({folder: read_config(folder) for folder in folders})
    seeds: dict[str, list[list[dict]]] = {}
    logs: dict[str, SampleLog] = {}
    for folder, name in names.items():
        seeds.setdefault(name, []).append(read_metrics(folder))
        # The heat map of an experiment counts the verdicts of all its seeds.
        path = folder / "samples.jsonl"
        log = logs.setdefault(name, SampleLog(path))
        log.turn_to(path)
        log.read_on()

    lines = []
    for name, rows in seeds.items():
        plural = "seed" if len(rows) == 1 else "seeds"
        lines.append(Line(f"{shorten(name, 60)} ({len(rows)} {plural})", rows))
    title = f"{len(folders)} runs: mean over seeds, band of one standard deviation"
    with drawing():
        png = draw_picture(lines, None, title)
        parts = [f"<h1>{len(folders)} runs</h1>", comparison_table(lines)]
        parts.append(f'<div class="panels">{"".join(panel_figures(lines))}</div>')
        for line, log in zip(lines, logs.values()):
            section = heat_section(log)
            if section:
                parts += [f"<h2>{markup(line.name)}</h2>", *section[1:]]
    write_file(picture, png)
    write_file(picture.with_suffix(".html"), page(f"{len(folders)} runs", parts).encode("utf8"))


def comparison_table(lines: list[Line]) -> str:
    """Held-out score before and after, mean over seeds, in the colour of the line."""
    rows = [
        "<tr><th>held-out score</th><th>first</th><th>last</th><th>std over seeds</th></tr>"
    ]
    for place, line in enumerate(lines):
        first = []
        last = []
        for seed in line.seeds:
            scores = [row["eval_score"] for row in seed if row["eval_score"] is not None]
            first += scores[:1]
            last += scores[-1:]
        spread = number_text(statistics.pstdev(last)) if len(last) > 1 else "one seed"
        mark = f'<span style="color:{COLOURS[place % len(COLOURS)]}">■</span>'
        cells = [
            f"{mark} {markup(line.name)}",
            number_text(nanmean(first)),
            number_text(nanmean(last)),
            spread,
        ]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f'<div class="wide"><table>{"".join(rows)}</table></div>'


# ---------------------------------------------------------------------------------- evolving rubrics


def read_buffers(folder: Path) -> dict[str, dict]:
    """Prompt -> its rubrics in the run's last checkpoint ({} where there are none). Raises DataError."""
    path = folder / "checkpoint" / "trainer.pt"
    if not path.is_file():
        return {}
    import torch

    try:
        # mmap: the optimizer's state, gigabytes, stays on the disk. weights_only: no pickle may run code.
        state = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
        buffers = state["method"].get("buffers", {})
    except Exception as error:  # torch has a dozen kinds for a broken file
        reason = printable(str(error)).partition("\n")[0][:200]
        raise DataError(f"{path}: not a checkpoint's state ({reason})") from None
    return buffers


def lives(buffer: dict) -> list[dict]:
    """All rubrics of a prompt: initial ones, then evolving ones in the order of their birth."""
    evolving = buffer["active"] + buffer["retired"]
    return buffer["persistent"] + sorted(evolving, key=lambda item: item["born"])


def busiest(buffers: dict[str, dict]) -> str:
    """The prompt with most rubrics: it has most to show."""
    return max(buffers, key=lambda prompt: len(lives(buffers[prompt])))


def rubric_lines(prompt: str, buffer: dict) -> list[str]:
    """Two lines per rubric: weight, text, birth and end; the std of its verdicts at each visit."""
    initial, active, retired = (
        len(buffer[part]) for part in ("persistent", "active", "retired")
    )
    lines = [f"{prompt}: {initial} initial, {active} active, {retired} retired rubrics"]
    for item in lives(buffer):
        fate = "active"
        if item["retired"] is not None:
            fate = f"retired in step {item['retired']}, {item['why']}"
        origin = f"born in step {item['born']}, {fate}" if item["born"] else "initial"
        lines.append(f"  {item['weight']:+.2f}  {item['text']}  [{origin}]")

        visits = []
        for step, std in item["seen"]:
            visits.append(f"{step}: {'?' if std is None else format(std, '.2f')}")
        lines.append("         std " + "  ".join(visits))
    return [printable(line) for line in lines]


def draw_lives(axes, buffer: dict) -> None:
    """One row per rubric, one column per step, dark where its verdicts differed, x where it ended."""
    items = lives(buffer)
    for y, item in enumerate(items):
        # Without verdicts there is no spread to show; matplotlib leaves nan out.
        steps = [step for step, _ in item["seen"]]
        spread = [math.nan if std is None else std for _, std in item["seen"]]
        axes.scatter(
            steps, [y] * len(steps), c=spread, cmap="Blues", vmin=-0.05, vmax=0.5,
            marker="s", edgecolors="lightgray", linewidths=0.3,
        )  # fmt: skip
        if item["retired"] is not None:
            axes.plot([item["retired"]], [y], "x", color="#b0413e", markersize=6)

    names = []
    for item in items:
        names.append(f"{'+' if item['weight'] > 0 else '-'} {shorten(item['text'], 58)}")
    axes.set_yticks(range(len(items)), names, fontsize=11)
    axes.axhline(len(buffer["persistent"]) - 0.5, color="gray", linewidth=0.5)
    axes.invert_yaxis()
    axes.set_xlabel("step")
    axes.xaxis.get_major_locator().set_params(integer=True)


def rubric_section(folder: Path, config: dict) -> list[str]:
    """The life of the rubrics of one prompt, where the run's method is rler."""
    if config.get("method") != "rler":
        return []
    buffers = read_buffers(folder)
    if not buffers:
        return []
    prompt = busiest(buffers)
    figure = new_figure(11, 1.2 + 0.27 * len(lives(buffers[prompt])))
    draw_lives(figure.subplots(), buffers[prompt])
    name = f"Life of the rubrics of {prompt}"
    note = (
        "As of the last checkpoint. Above the line the initial rubric; dark: the verdicts differ, so the "
        "criterion tells the rollouts apart; x: retired. Other prompts: python tools/report.py RUN --rubrics --prompt ID"
    )
    drawn = f'<div class="wide lives">{as_svg(figure, name)}</div>'
    return [f"<h2>{markup(name)}</h2>", f'<p class="soft">{markup(note)}</p>', drawn]


def print_rubrics(folder: Path, prompt: str) -> None:
    """--rubrics: the life of every rubric of a prompt. Raises DataError."""
    read_config(folder)
    buffers = read_buffers(folder)
    if not buffers:
        raise DataError(
            f"{folder}: no checkpoint with evolving rubrics; give a run with --method rler"
        )
    prompt = prompt or busiest(buffers)
    if prompt not in buffers:
        raise DataError(
            f"--prompt {prompt}: not in this run; it has {', '.join(sorted(buffers))}"
        )
    print("\n".join(rubric_lines(prompt, buffers[prompt])))


# ---------------------------------------------------------------------------------- in words


def interval_text(low: float, high: float, sign: str = "") -> str:
    """A 95 % interval; of a single prompt there is none: resampling one value gives that value.

    >>> interval_text(0.1, 0.2, "+"), interval_text(math.nan, math.nan)
    ('95 % interval +0.100 to +0.200', 'one prompt: no interval')
    """
    if math.isnan(low):
        return "one prompt: no interval"
    return f"95 % interval {low:{sign}.3f} to {high:{sign}.3f}"


def score_sentences(metrics: list[dict], log: SampleLog) -> list[str]:
    """Before and after on the held-out prompts, and who says so.

    The interval is of the gain, prompt by prompt (paired): prompts differ far more among themselves
    than one does before and after, so the intervals of the two scores overlap even where the gain is
    certain.
    """
    first, last = log.ends("heldout")
    if not first or first is last:
        return []
    rewards_before = {sample.id: sample.reward for sample in first}
    old = []
    new = []
    gains = []
    for sample in last:
        before = rewards_before.get(sample.id)
        after = sample.reward
        old.append(math.nan if before is None else before)
        new.append(math.nan if after is None else after)
        gains.append(new[-1] - old[-1])
    gain = interval_text(*bootstrap(gains), "+")
    scores = f"held-out score  {nanmean(old):.3f} -> {nanmean(new):.3f}"
    gained = f"gain {nanmean(gains):+.3f}, {gain} ({len(gains)} prompts, paired bootstrap)"
    sentences = [f"{scores}   {gained}"]

    # A policy learns the taste of the judge that pays it. Whether it learnt more than that, only a
    # judge can say that did not pay.
    paid = [row["eval_score"] for row in metrics if row["eval_score"] is not None]
    other = [row["eval_other_score"] for row in metrics if row["eval_other_score"] is not None]
    if len(other) > 1:
        sentences.append(
            f"the judge that pays: {paid[0]:.2f} -> {paid[-1]:.2f}; "
            f"the judge that does not: {other[0]:.2f} -> {other[-1]:.2f}"
        )
    else:
        sentences.append("scored by the judge that pays: the payer is the examiner")
    return sentences


def changed_criteria(
    first: list[Sample], last: list[Sample]
) -> list[tuple[str, float, float, int]]:
    """(title, share of good verdicts before, after, prompts), the largest change first.

    Over the criteria that several held-out prompts share, and verdicts that both answers have.
    """
    verdicts_before = {sample.id: sample.verdicts for sample in first}
    pairs: dict[str, list[tuple[float, float]]] = {}
    for sample in last:
        for old, new in zip(verdicts_before.get(sample.id, []), sample.verdicts):
            if (
                old.title == new.title
                and old.satisfied is not None
                and new.satisfied is not None
            ):
                pairs.setdefault(new.title, []).append((old.satisfied, new.satisfied))

    changed = []
    for title, values in pairs.items():
        if len(values) > 1:
            before = statistics.fmean(old for old, _ in values)
            after = statistics.fmean(new for _, new in values)
            changed.append((title, before, after, len(values)))
    return sorted(changed, key=lambda row: -abs(row[2] - row[1]))


def one_answer(folder: Path, first: list[Sample], last: list[Sample]) -> list[str]:
    """The answer that gained most, before and after: an illustration, no evidence."""
    answers_before = {sample.id: sample for sample in first}
    best = None
    best_gain = -math.inf
    for after in last:
        before = answers_before.get(after.id)
        if before is None:
            continue
        gain = gain_of(before, after)
        if best is None or gain > best_gain:
            best = (before, after)
            best_gain = -math.inf if math.isnan(gain) else gain
    if best is None:
        return []

    before, after = best
    question = read_prompts(folder, {after.id}).get(after.id, after.id)
    return [
        "",
        "one answer, before and after",
        f"  question: {question}",
        f"  before  : {before.text.strip()}   [{number_text(before.reward, '.2f')}]",
        f"  after   : {after.text.strip()}   [{number_text(after.reward, '.2f')}]",
    ]


def summarise(run_folder: Path) -> str:
    """What a run says at its end: scores, criteria that changed, one answer. Raises DataError."""
    folder = Path(run_folder)
    metrics = read_metrics(folder)
    log = open_log(folder)
    first, last = log.ends("heldout")

    lines = ["", *score_sentences(metrics, log)]
    rewards = [row["reward"] for row in metrics if row["reward"] is not None]
    if len(rewards) >= 10:
        early = statistics.fmean(rewards[:5])
        late = statistics.fmean(rewards[-5:])
        lines.append(
            f"training reward {early:.3f} -> {late:.3f}   (mean of the first and of the last five steps)"
        )

    changed = changed_criteria(first, last)[:5]
    if changed:
        lines += [
            "",
            "criteria that changed most (share of held-out answers that are right in this respect):",
        ]
    for title, before, after, n in changed:
        lines.append(f"  {title:<22} {before:4.0%} -> {after:4.0%}   ({n} prompts)")
    lines += one_answer(folder, first, last)
    return printable("\n".join(lines))


# ---------------------------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    """argparse, whose errors are one line like all others."""

    def error(self, message: str):
        """Raises DataError."""
        raise DataError(f"{message}; see --help")


def picture_path(folders: list[Path], out: str) -> Path:
    """Where the picture goes. Raises DataError."""
    if not out:
        return folders[0] / "report.png" if len(folders) == 1 else Path("runs.png")
    path = Path(out)
    if path.suffix.lower() == ".png":
        return path
    if path.is_file():
        raise DataError(f"--out {out}: a file that is no picture; name a .png file or a folder")
    return path / "report.png"


def main(argv: list[str] | None = None) -> int:
    """Exit status 0, or 2 with one line that says what is wrong, where, and what to do."""
    parser = Parser(
        prog="report.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", nargs="+", help="the folder of a run; several are compared")
    parser.add_argument(
        "--out", default="", help="a .png file or a folder [RUN/report.png; runs.png]"
    )
    parser.add_argument(
        "--rubrics", action="store_true", help="RLER: print the life of a prompt's rubrics"
    )
    parser.add_argument("--prompt", default="", help="its id [the prompt with most rubrics]")
    try:
        args = parser.parse_args(argv)
        folders = [Path(name) for name in args.run]
        if args.rubrics:
            print_rubrics(folders[0], args.prompt)
        else:
            picture = picture_path(folders, args.out)
            if len(folders) == 1:
                write_run_report(folders[0], picture)
            else:
                write_comparison(folders, picture)
            runs = "1 run" if len(folders) == 1 else f"{len(folders)} runs"
            print(f"{runs}: {picture.with_suffix('.html')}, {picture}")
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has seen enough (`| head -1`). Nothing is wrong, and Python must not try to write on.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (DataError, OSError) as error:
        print(f"report.py: {printable(str(error))}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
