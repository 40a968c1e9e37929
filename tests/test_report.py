"""tools/report.py: the page, seen by a parser and a real browser; the picture; the words."""

import doctest
import io
import json
import math
import os
import random
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import asdict
from html.parser import HTMLParser

import pytest
import torch
from conftest import ROOT

import grpo
import rar
import rler
import train
from judge import Verdict
from tools import compare, report

FLAGS = (
    "--steps 3 --prompts_per_step 2 --group_size 3 --max_new_tokens 6 --eval_every 2 "
    "--save_every 1 --prompts 5 --judge lexical"
)
SMALL = FLAGS.split()

HOSTILE = (
    '</pre><script>document.title="owned"</script><img src=x onerror=\'document.title="owned"\'>'
    '"&amp; <b>{body}{title}</b>\u2028'
)

# One payload per way in which text has become a program somewhere: markup, attributes, ends of
# blocks, other namespaces, encodings, templates, addresses, styles, control characters.
RUN = 'document.title="owned"'
PAYLOADS = [
    f"<script>{RUN}</script>",
    f"</style><script>{RUN}</script>",
    f"</title><script>{RUN}</script>",
    f"</textarea></noscript></pre><script>{RUN}</script>",
    f"--><script>{RUN}</script>",
    f"]]><script>{RUN}</script>",
    f"</svg></figure><script>{RUN}</script>",
    f"<ScRiPt>{RUN}</sCrIpT>",
    f"<script\x00>{RUN}</script>",
    f"<script\n>{RUN}</script\n>",
    f"<script src='data:text/javascript,{RUN}'></script>",
    f"<script type=module>{RUN}</script>",
    f"<svg><script>{RUN}</script></svg>",
    f"<math><mtext></mtext><script>{RUN}</script></math>",
    f"<svg onload='{RUN}'>",
    f"<img src=x onerror='{RUN}'>",
    f"\"><img src=x onerror='{RUN}'>",
    "'><img src=x onerror=\"document.title='owned'\">",
    f"<body onload='{RUN}'>",
    f"<details open ontoggle='{RUN}'>",
    f"<input autofocus onfocus='{RUN}'>",
    f"<video><source onerror='{RUN}'></video>",
    f'<iframe srcdoc="<script>parent.{RUN.replace(chr(34), chr(39))}</script>"></iframe>',
    f"<iframe src='javascript:parent.{RUN}'></iframe>",
    f"<object data='javascript:{RUN}'></object>",
    f"<a id=x href='javascript:{RUN}'>x</a><script>x.click()</script>",
    "<meta http-equiv=refresh content='0;url=javascript:document.title=\"owned\"'>",
    f"<base href='javascript:/a/'><link rel=stylesheet href='{RUN}'>",
    "<style>@import 'javascript:document.title=\"owned\"'; * { background: url(x) }</style>",
    f"&lt;script&gt;{RUN}&lt;/script&gt;",
    f"\\u003cscript\\u003e{RUN}\\u003c/script\\u003e",
    f"+ADw-script+AD4-{RUN}+ADw-/script+AD4-",
    f"${{{RUN}}} {{{{{RUN}}}}} $\\frac{{a}}{{$ \x1b]0;owned\x07 \u202e<script>{RUN}</script>",
]
ALLOWED = {
    "html",
    "head",
    "meta",
    "title",
    "style",
    "body",
    "h1",
    "h2",
    "h3",
    "p",
    "div",
    "span",
    "figure",
    "details",
    "summary",
    "table",
    "tbody",
    "tr",
    "td",
    "th",
    "svg",
    "g",
    "path",
    "defs",
    "use",
    "text",
    "tspan",
    "rect",
    "clippath",
    "metadata",
}


class Page(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)


def example(name, rubric, prompt="What helps?"):
    return rar.Example(name, [{"role": "user", "content": prompt}], rubric)


def rollout(text, rubric, scores, reward=0.5, advantage=-0.7, reason=""):
    verdicts = [Verdict(score, reason) for score in scores]
    judged = {
        "criteria": rubric,
        "verdicts": verdicts,
        "reward": reward,
        "advantage": advantage,
    }
    return grpo.Rollout([1], [2, 3], [0.0, 0.0], "stop", text, **judged)


def write_run(path, rollouts, metrics=(), **settings):
    """A run's folder, written by what writes real ones. rollouts: (step, split, groups) each."""
    config = train.Config(out=str(path), **settings)
    folder = train.RunFolder(config)
    examples = {e.id: e for _, _, groups in rollouts for e, _ in groups}
    folder.write_start(
        train.Run(config, None, None, None, None, list(examples.values()), [], [])
    )
    for step, split, groups in rollouts:
        folder.write_samples(step, split, [rar.Group(*group) for group in groups])
    folder.append("metrics.jsonl", list(metrics))
    folder.release()
    return path


def hostile_run(path, texts=(HOSTILE,)):
    """A run's folder whose every text is hostile, and its page."""
    groups = []
    for text in texts:
        rubric = [
            rar.Criterion(text, 2, text, axis=text),
            rar.Criterion("x", -1, "Fault"),
            rar.Criterion("y", 1, "Gone"),
        ]
        said = rollout(text, rubric, [1.0, 1.0, None], reason=text)
        said.finish = text
        groups.append((example(text, rubric, text), [said]))
    steps = [
        (step, split, groups)
        for step, split in (
            (0, "heldout"),
            (1, "train"),
            (2, "train"),
            (3, "train"),
            (3, "heldout"),
        )
    ]
    metrics = [{"step": 0, "eval_score": 0.5, "eval_ci": [0.4, 0.6]}]
    metrics += [
        {"step": n, "reward": 0.5, "reward_std": 0.1, "kl": 0.0, "completion_tokens": 2.0}
        for n in (1, 2, 3)
    ]
    write_run(
        path,
        steps,
        metrics,
        model=report.printable(texts[0]),
        judge_model=report.printable(texts[-1]),
    )
    report.write_report(path)
    return path / "report.html"


def test_a_hostile_completion_stays_text(tmp_path):
    text = hostile_run(tmp_path / "run").read_text(encoding="utf8")
    page = Page(text)
    tags = {tag for tag, _ in page.tags}
    assert tags <= ALLOWED and not {"script", "b", "iframe", "link", "img", "pre"} & tags
    assert not any(key.startswith("on") for _, attrs in page.tags for key in attrs)
    shown = report.printable(HOSTILE)
    assert shown.endswith("</b>\\u2028")
    # Of each rollout and answer: the text, a criterion's title, the judge's reason, the prompt.
    assert page.text.count(shown) >= 4 * 3
    for words in (
        "Rollouts of training step 1",
        "Rollouts of training step 3",
        "Held-out answers, first and last",
    ):
        assert words in page.text
    assert "Rollouts of training step 2" not in page.text
    assert not re.search(
        r"(src|href)=.?https?://|@import|url\((?!#)", text.partition("<body>")[0]
    )


def test_the_pages_policy_allows_no_script_at_all(tmp_path):
    page = Page(hostile_run(tmp_path / "run").read_text(encoding="utf8"))
    [policy] = [
        attrs["content"]
        for tag, attrs in page.tags
        if attrs.get("http-equiv") == "Content-Security-Policy"
    ]
    assert (
        "default-src 'none'" in policy and "script-src" not in policy and "https:" not in policy
    )
    links = [
        value
        for _, attrs in page.tags
        for key, value in attrs.items()
        if key in ("href", "src", "xlink:href")
    ]
    assert all(link.startswith("#") for link in links)  # marks of a curve, in the page itself


def test_a_real_run_has_its_page(tiny, few, tmp_path):
    out = tmp_path / "run"
    assert (
        train.main(["--model", str(tiny), "--eval_data", few, *SMALL, "--out", str(out)]) == 0
    )
    page = Page((out / "report.html").read_text(encoding="utf8"))
    # First and last step: two prompts and their three rollouts; two held-out prompts; settings.
    assert [tag for tag, _ in page.tags].count("details") == 2 * (2 + 2 * 3) + 2 + 1
    rows = [
        json.loads(line) for line in (out / "samples.jsonl").read_bytes().split(b"\n") if line
    ]
    assert report.printable(rows[-1]["text"]) in "".join(page.text)
    assert [row["step"] for row in report.read_metrics(out)] == [0, 1, 2, 3]
    assert "steps" in page.text and "Which criteria are learned when" in page.text
    question = json.loads((out / "prompts.jsonl").read_bytes().split(b"\n")[-2])["prompt"][-1][
        "content"
    ]
    assert question in page.text
    assert (out / "report.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(out.glob("*.tmp"))


def chromium(tmp_path, width, *what):
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",  # it is small in containers, and shared
        "--no-first-run",
        "--disable-background-networking",
        "--disable-sync",
        "--disable-component-update",
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--window-size={width},900",
    ]
    return subprocess.run(
        ["chromium", *flags, *what], capture_output=True, text=True, timeout=120, check=True
    ).stdout


needs_chromium = pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium")


@needs_chromium
@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_real_browser(tmp_path, width):
    """What the browser makes of the page: hostile text is text, each verdict has its colour."""
    path = hostile_run(tmp_path / "run")
    dumped = chromium(tmp_path, width, "--dump-dom", path.as_uri())
    assert (
        re.search(r"<title>(.*?)</title>", dumped)[1] == "explicit, seed 0: run"
    )  # no script has changed it
    page = Page(dumped)
    tags = [tag for tag, _ in page.tags]
    assert set(tags) <= ALLOWED and tags.count("details") == 2 * 2 + 1 + 1
    assert not any(key.startswith("on") for _, attrs in page.tags for key in attrs)
    assert page.text.count(report.printable(HOSTILE)) >= 4 * 3
    kinds = [
        attrs["class"]
        for tag, attrs in page.tags
        if attrs.get("class") in ("good", "bad", "none")
    ]
    assert kinds[-3:] == ["good", "bad", "none"]
    for cell in (
        "weight +2",
        "weight -1",
        "✓ met",
        "✗ met",
        "? missing",
        "Rollouts of training step 1",
    ):
        assert cell in page.text
    assert tags.count("figure") == 4 + 2  # the panels, and a heat map per split
    shot = tmp_path / "shot.png"
    chromium(tmp_path, width, f"--screenshot={shot}", path.as_uri())
    assert shot.read_bytes()[:4] == b"\x89PNG"


@needs_chromium
def test_no_script_runs_from_any_payload(tmp_path):
    """33 payloads, each as prompt, id, title, axis, reason, answer and setting."""
    assert len(PAYLOADS) == 33
    path = hostile_run(tmp_path / "run", PAYLOADS)
    dumped = chromium(tmp_path, 1280, "--dump-dom", path.as_uri())
    assert re.search(r"<title>(.*?)</title>", dumped)[1] == "explicit, seed 0: run"
    page = Page(dumped)
    assert {tag for tag, _ in page.tags} <= ALLOWED
    assert not any(
        key.startswith("on") or "javascript:" in (value or "")
        for _, attrs in page.tags
        for key, value in attrs.items()
        if key != "aria-label"
    )
    for payload in PAYLOADS:
        assert report.printable(payload) in page.text

    # The test can fail: without the escapes the first payload runs.
    raw = tmp_path / "raw.html"
    raw.write_text(f"<title>fine</title><pre>{PAYLOADS[0]}</pre>", encoding="utf8")
    assert "<title>owned</title>" in chromium(tmp_path, 1280, "--dump-dom", raw.as_uri())


def test_runs_are_compared_in_a_page_and_a_picture(tmp_path, capsys, monkeypatch):
    rubric = [rar.Criterion("Rest.", 1, "Rest")]
    folders = []
    for seed, method in ((0, "explicit"), (1, "explicit"), (0, "points")):
        groups = [
            (example(name, rubric), [rollout("x", rubric, [float(seed)])]) for name in "ab"
        ]
        metrics = [
            {"step": step, "reward": 0.1 * step + seed, "eval_score": 0.2 + 0.1 * seed}
            for step in (1, 2, 3)
        ]
        folders.append(
            str(
                write_run(
                    tmp_path / f"{method}{seed}",
                    [(1, "train", groups)],
                    metrics,
                    seed=seed,
                    method=method,
                )
            )
        )
    monkeypatch.chdir(tmp_path)
    assert report.main(folders) == 0
    assert "3 runs: runs.html, runs.png" in capsys.readouterr().out
    assert report.main([*folders, "--out", str(tmp_path / "both")]) == 0
    assert report.main([*folders, "--out", str(tmp_path / "named.html")]) == 0
    assert (tmp_path / "named.html").exists() and (tmp_path / "named.png").exists()
    for picture in (tmp_path / "runs.png", tmp_path / "both" / "report.png"):
        assert picture.read_bytes()[:4] == b"\x89PNG"
    page = Page((tmp_path / "runs.html").read_text(encoding="utf8"))
    text = "".join(page.text)
    for words in (
        "method explicit (2 seeds)",
        "method points (1 seed)",
        "0.250",
        "0.050",
        "one seed",
    ):
        assert words in text
    assert report.main([*folders, str(tmp_path / "nothing")]) == 2
    error = capsys.readouterr().err
    assert "no run there" in error and error.count("\n") == 1


def test_seeds_are_one_line(tmp_path):
    configs = {
        "a": {"method": "explicit", "seed": 0, "out": "a"},
        "b": {"method": "explicit", "seed": 1, "out": "b"},
        "c": {"method": "points", "seed": 0, "out": "c"},
    }
    assert report.line_names(configs) == {
        "a": "method explicit",
        "b": "method explicit",
        "c": "method points",
    }
    assert report.line_names({"a": configs["a"], "b": configs["b"]}) == {
        "a": "explicit",
        "b": "explicit",
    }


def test_a_run_that_is_named_twice_is_one(tmp_path, capsys, monkeypatch):
    run = heldout_run(tmp_path / "r2", {"cold": ("worse", 0.2)}, {"cold": ("better", 0.7)})
    other = heldout_run(
        tmp_path / "r3", {"cold": ("worse", 0.2)}, {"cold": ("better", 0.7)}, seed=1
    )
    (tmp_path / "link").symlink_to(run)
    monkeypatch.chdir(tmp_path)
    assert report.main(["r2", str(run), "../" + tmp_path.name + "/r2", "link"]) == 0
    assert capsys.readouterr().out.startswith("1 run: ")
    assert report.main(["r2", str(other), str(run), "--out", "both.png"]) == 0
    assert capsys.readouterr().out.startswith("2 runs: ")
    assert "(2 seeds)" in (tmp_path / "both.html").read_text(encoding="utf8")


def test_mean_and_band_over_seeds():
    row = {"reward_std": 0.3, "eval_ci": (0.1, 0.4)}
    assert report.band([{"reward": 1.0, **row}, {"reward": 2.0, **row}], "reward") == (1.0, 2.0)
    assert report.band([{"reward": 1.0, **row}], "reward") == (0.7, 1.3)
    assert report.band([{"eval_score": 0.2, **row}], "eval_score") == (0.1, 0.4)
    assert report.band([{"eval_score": 0.2, "eval_ci": None}], "eval_score") == (0.2, 0.2)


# ----------------------------------------------------------------------------- pass rates

RUBRIC = [
    rar.Criterion("Mentions rest.", 5, "Rest", axis="accuracy"),
    rar.Criterion("Mentions cheese.", -2, "Cheese", axis="tone"),
]


def rates_run(path, steps):
    """Each step has two prompts; scores: of Rest and of Cheese."""
    rollouts = []
    for step, scores in steps.items():
        groups = [
            (
                example(name, RUBRIC),
                [rollout("x", RUBRIC, scores), rollout("y", RUBRIC, [0.0, None])],
            )
            for name in "ab"
        ]
        rollouts.append((step, "train", groups))
    return write_run(path, rollouts)


def test_pass_rates_turn_faults_round_and_leave_missing_verdicts_out(tmp_path):
    path = rates_run(tmp_path / "run", {1: [0.0, 1.0], 2: [1.0, 0.25]})
    log = report.SampleLog(path / "samples.jsonl").read_on()
    assert log.titles["train"].cells == {
        "Rest": {1: [0.0, 4], 2: [2.0, 4]},
        "Cheese": {1: [0.0, 2], 2: [1.5, 2]},
    }
    assert log.axes["train"].cells["tone"] == {1: [0.0, 2], 2: [1.5, 2]}
    rates, labels = report.choose_labels(log)
    assert labels == ["Cheese", "Rest"]  # gained 0.75 and 0.5
    assert rates["train"].shared_labels() == ["Rest", "Cheese"]


def test_rows_are_axes_where_no_criterion_is_shared(tmp_path):
    groups = []
    for name in "ab":
        rubric = [rar.Criterion("x", 1, f"Only {name}", axis="accuracy")]
        groups.append((example(name, rubric), [rollout("x", rubric, [1.0])]))
    path = write_run(tmp_path / "run", [(1, "train", groups)])
    log = report.SampleLog(path / "samples.jsonl").read_on()
    assert report.choose_labels(log)[1] == ["accuracy"]


def test_a_long_run_has_few_columns_and_loses_no_verdict():
    rates = report.PassRates()
    for step in range(1, 1001):
        rates.add("Rest", step, "a", step % 2)
    assert len(rates.columns) <= report.MAX_COLUMNS and rates.width == 32
    total = sum(cell[0] for cell in rates.cells["Rest"].values())
    assert total == 500 and rates.n_verdicts("Rest") == 1000
    assert rates.cells["Rest"][32] == [16, 32]


def test_only_new_lines_are_read_and_a_resumed_run_is_read_again(tmp_path):
    path = (
        rates_run(tmp_path / "run", {1: [0.0, 1.0], 2: [1.0, 0.0], 3: [1.0, 0.0]})
        / "samples.jsonl"
    )
    lines = path.read_bytes().split(b"\n")[:-1]
    fresh = lambda: vars(report.SampleLog(path).read_on())

    path.write_bytes(
        b"\n".join(lines[:6]) + b"\n" + lines[6][:20]
    )  # the seventh is being written
    log = report.SampleLog(path).read_on()
    assert log.number == 6 and log.offset == sum(len(line) + 1 for line in lines[:6])
    path.write_bytes(b"\n".join(lines) + b"\n")
    log.read_on()
    assert log.number == 12 and vars(log) == fresh()

    path.write_bytes(
        b"\n".join(lines[:4] + lines[8:]) + b"\n"
    )  # cut back to step 1, and on with other rows
    assert vars(log.read_on()) == fresh() and log.number == 8


def test_memory_holds_two_steps_however_long_the_run(tmp_path):
    path = rates_run(tmp_path / "run", {step: [1.0, 0.0] for step in range(1, 200)})
    log = report.SampleLog(path / "samples.jsonl").read_on()
    assert {step: len(rows) for step, rows in log.rollouts["train"].items()} == {1: 4, 199: 4}


# ----------------------------------------------------------------------------- in words


def heldout_run(path, before, after, metrics=(), **settings):
    """One held-out evaluation before, one after; before and after: prompt -> (text, reward)."""
    rollouts = []
    for step, answers in ((0, before), (3, after)):
        groups = [
            (example(name, RUBRIC), [rollout(text, RUBRIC, [1.0, 0.0], reward)])
            for name, (text, reward) in answers.items()
        ]
        rollouts.append((step, "heldout", groups))
    return write_run(path, rollouts, metrics, **settings)


def test_the_summary_tells_a_gain_from_a_loss(tmp_path):
    path = heldout_run(
        tmp_path / "run",
        {"cold": ("worse", 0.2), "flu": ("same", 0.5)},
        {"cold": ("better", 0.7), "flu": ("same", 0.5)},
    )
    said = report.summarise(path)
    assert (
        "0.350 -> 0.600   gain +0.250, 95 % interval +0.000 to +0.500 "
        "(2 prompts, paired bootstrap)"
        in said
    )
    assert said.index("worse") < said.index("better") and "  question: What helps?" in said
    assert "the payer is the examiner" in said and "Rest" in said


def test_the_runs_of_a_question_are_one_value(tmp_path):
    """Twelve questions, each asked four times: the interval is that of compare.py, for twelve."""
    rng = random.Random(0)
    before, after, rows = [], [], []
    for question in range(12):
        gain = float(rng.random() < 0.6)
        for order in range(4):
            name = f"q{question}-{order}"
            asked = rar.Example(name, [{"role": "user", "content": "Which?"}], RUBRIC)
            asked.tags = [f"question:q{question}"]
            before.append((asked, [rollout("old", RUBRIC, [0.0, 0.0], 0.0)]))
            after.append((asked, [rollout("new", RUBRIC, [1.0, 0.0], gain)]))
            rows.append({"id": name, "item": f"q{question}", "score": gain})
    steps = [(0, "heldout", before), (3, "heldout", after)]
    said = report.summarise(write_run(tmp_path / "run", steps, [{"step": 0}]))
    wanted = compare.compare([row | {"score": 0.0} for row in rows], rows)
    low, high = wanted["difference_ci"]
    assert wanted["n"] == 12
    interval = f"gain {wanted['difference']:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}"
    assert f"{interval} (12 questions, paired bootstrap)" in said

    row = {"id": "q0-0", "prompt": [], "tags": "question:q0"}
    (tmp_path / "run" / "prompts.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(rar.DataError, match="prompts.jsonl:1: tags must be a list of texts"):
        report.summarise(tmp_path / "run")

    # Without the file, as older versions left it, the ids must do.
    (tmp_path / "run" / "prompts.jsonl").unlink()
    assert "(48 prompts, paired bootstrap)" in report.summarise(tmp_path / "run")


def test_one_held_out_prompt_has_no_interval(tmp_path):
    said = report.summarise(
        heldout_run(tmp_path / "run", {"cold": ("worse", 0.2)}, {"cold": ("better", 0.7)})
    )
    assert (
        "one prompt: no interval" in said
        and "criteria that changed" not in said
        and "nan" not in said
    )


def test_a_second_judge_is_heard(tmp_path):
    metrics = [
        {"step": 0, "eval_score": 0.38, "eval_other_score": 0.37, "eval_ci": [0.3, 0.4]},
        {"step": 3, "eval_score": 0.52, "eval_other_score": 0.41, "eval_ci": [0.4, 0.6]},
    ]
    path = heldout_run(
        tmp_path / "run", {"cold": ("worse", 0.2)}, {"cold": ("better", 0.7)}, metrics
    )
    said = report.summarise(path)
    assert (
        "the judge that pays: 0.38 -> 0.52; the judge that does not: 0.37 -> 0.41" in said
        and "examiner" not in said
    )
    report.write_report(path)
    text = Page((path / "report.html").read_text(encoding="utf8")).text
    assert "the judge that does not" in text


def test_training_reward_of_the_first_and_last_five_steps(tmp_path):
    metrics = [{"step": step, "reward": step / 10} for step in range(1, 11)]
    path = heldout_run(
        tmp_path / "run", {"cold": ("worse", 0.2)}, {"cold": ("better", 0.7)}, metrics
    )
    assert "training reward 0.300 -> 0.800" in report.summarise(path)


def sample(name, scores, reward=0.5, step=0):
    verdicts = [report.Judged(c.title, c.weight, s, "", c.axis) for c, s in zip(THREE, scores)]
    return report.Sample(step, "heldout", name, "x", "stop", 2, verdicts, reward, None)


THREE = [*RUBRIC, rar.Criterion("Mentions water.", 2, "Water")]


def test_changed_criteria_turn_faults_round():
    pairs = [(sample(name, (0, 1, 1)), sample(name, (0, 0, 1))) for name in "ab"]
    assert report.changed_criteria(pairs) == [
        ("Cheese", 0, 1, 2),
        ("Rest", 0, 0, 2),
        ("Water", 1, 1, 2),
    ]


def test_what_could_not_be_scored_is_said_and_is_no_zero(tmp_path):
    path = heldout_run(
        tmp_path / "run",
        {"cold": ("a", math.nan), "flu": ("b", 0.25)},
        {"cold": ("c", 0.5), "flu": ("d", 0.75)},
    )
    assert "gain +0.500" in report.summarise(path) and "flu" not in report.summarise(path)
    report.write_report(path)
    page = Page((path / "report.html").read_text(encoding="utf8"))
    figures = [
        text
        for text in page.text
        if "→" in text and "held-out" not in text and "pays" not in text
    ]
    assert figures == ["0.250 → 0.750", "not scored → 0.500"]  # the unscored pair comes last


def test_of_many_answers_the_largest_gains_and_losses_are_shown(tmp_path):
    before = {f"p{n}": ("old", 0.0) for n in range(50)}
    after = {f"p{n}": ("new", n / 100 - 0.25) for n in range(50)}
    path = heldout_run(tmp_path / "run", before, after)
    report.write_report(path)
    page = Page((path / "report.html").read_text(encoding="utf8"))
    shown = [text for text in page.text if text.startswith("0.000 → ")]
    assert len(shown) == report.MAX_PROMPTS and shown[0] == "0.000 → 0.240" and shown[-1] == "0.000 → -0.250"
    assert any("10 of 50 prompts are only in samples.jsonl" in text for text in page.text)


def test_nothing_scored_is_said(tmp_path):
    path = heldout_run(tmp_path / "run", {"cold": ("a", math.nan)}, {"cold": ("c", math.nan)})
    text = report.summarise(path)
    assert "not scored -> not scored   no prompt was scored both times" in text
    assert "nan" not in text and "one prompt" not in text


def test_a_terminal_obeys_no_answer(tmp_path):
    answer = "\x1b]0;owned\x07\x1b[31mred\u202e\x9b2J\r\udc80 nice\u200dé"
    path = heldout_run(tmp_path / "run", {"a": (answer, 0.1)}, {"a": (answer, 0.2)})
    said = report.summarise(path)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\ud800-\udfff]", said)
    assert "\\x1b]0;owned\\x07\\x1b[31mred\\u202e\\x9b2J\\r" in said and "nice\u200dé" in said


def test_the_same_run_has_the_same_page(whole_run, tmp_path):
    """Also when the log is read in two parts."""
    path = tmp_path / "run"
    shutil.copytree(whole_run, path)
    log = (path / "samples.jsonl").read_bytes()
    (path / "samples.jsonl").write_bytes(log[: log.index(b"\n") + 1])
    report.write_report(path)
    assert (path / "report.html").read_bytes() != (whole_run / "report.html").read_bytes()
    (path / "samples.jsonl").write_bytes(log)
    report.write_report(path)
    assert (path / "report.html").read_bytes() == (whole_run / "report.html").read_bytes()


def test_runs_of_an_older_version_are_drawn(tmp_path):
    """Without prompts.jsonl, axes and a second judge."""
    path = heldout_run(tmp_path / "run", {"cold": ("worse", 0.2)}, {"cold": ("better", 0.7)})
    (path / "prompts.jsonl").unlink()
    rows = [json.loads(line) for line in (path / "samples.jsonl").read_text().splitlines()]
    for row in rows:
        for verdict in row["verdicts"]:
            del verdict["axis"]
    (path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report.write_report(path)
    page = Page((path / "report.html").read_text(encoding="utf8"))
    assert "cold" in page.text and "  question: cold" in report.summarise(path)


def test_the_judges_password_is_not_on_the_page(tmp_path):
    path = heldout_run(tmp_path / "run", {"cold": ("worse", 0.2)}, {"cold": ("better", 0.7)})
    config = report.read_config(path) | {
        "judge": "http://me:pa/ss@w@host/v1?key=hush"
    }  # as older versions saved it
    (path / "config.json").write_text(json.dumps(config))
    report.write_report(path)
    text = (path / "report.html").read_text(encoding="utf8")
    assert "http://***@host/v1" in text and "pa/ss" not in text and "hush" not in text
    assert b"pa/ss" not in (path / "report.png").read_bytes()


# ----------------------------------------------------------------------------- evolving rubrics


def rler_run(path):
    """A run whose checkpoint holds an evolving rubric, saved as train.py saves it."""
    heldout_run(path, {"cold": ("worse", 0.2)}, {"cold": ("better", 0.7)}, method="rler")
    old = rler.EvolvingCriterion(
        "Mentions rest.", 1.0, "Rest", id="a", seen=[[1, 0.5], [2, None]]
    )
    new = rler.EvolvingCriterion(
        "Copies the \x1b[31mquestion <b>.",
        -1.0,
        "Copied",
        id="b",
        born=1,
        seen=[[1, 0.4], [2, 0.1]],
    )
    gone = rler.EvolvingCriterion(
        "Is short.", 1.0, "Short", id="c", born=2, seen=[[2, 0.0]], retired=2, why="no spread"
    )
    buffers = {
        "cold": asdict(rler.Buffer([old], [new], [gone])),
        "flu": asdict(rler.Buffer([old])),
    }
    (path / "checkpoint").mkdir()
    torch.save(
        {"step": 2, "method": {"step": 2, "buffers": buffers}},
        path / "checkpoint" / "trainer.pt",
    )
    return path


def test_the_life_of_rubrics(tmp_path, capsys):
    path = rler_run(tmp_path / "run")
    assert report.main([str(path), "--rubrics"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(
        "cold: 1 initial, 1 active, 1 retired rubrics\n"
    )  # the prompt with most to show
    assert "+1.00  Mentions rest.  [initial]" in said and "std 1: 0.50  2: ?" in said
    assert (
        "[born in step 1, active]" in said
        and "[born in step 2, retired in step 2, no spread]" in said
    )
    assert "\x1b" not in said and "\\x1b[31m" in said
    assert report.main([str(path), "--rubrics", "--prompt", "flu"]) == 0
    assert capsys.readouterr().out.startswith("flu: 1 initial, 0 active, 0 retired rubrics\n")
    assert report.main([str(path), "--rubrics", "--prompt", "nobody"]) == 2
    error = capsys.readouterr().err
    assert (
        "--prompt nobody: not in this run; it has cold, flu" in error and error.count("\n") == 1
    )

    report.write_report(path)
    page = Page((path / "report.html").read_text(encoding="utf8"))
    assert (
        "Life of the rubrics of cold" in page.text and {tag for tag, _ in page.tags} <= ALLOWED
    )
    assert any("Copies the \\x1b[31mquestion <b>." in text for text in page.text)
    (path / "checkpoint" / "trainer.pt").unlink()
    assert report.main([str(path), "--rubrics"]) == 2
    assert "no checkpoint with evolving rubrics" in capsys.readouterr().err
    report.write_report(path)  # before its first checkpoint a run has a page all the same
    assert "Life of the rubrics" not in (path / "report.html").read_text(encoding="utf8")


def test_of_hundreds_of_rubrics_the_youngest_are_drawn():
    initial = rler.EvolvingCriterion("Initial.", 1.0, seen=[[1, 0.5]])
    retired = []
    for step in range(1, 301):
        text = f"Born in step {step}."
        retired.append(rler.EvolvingCriterion(text, 1.0, born=step, seen=[[step, 0.1]], retired=step))
    axes = report.new_figure(5, 5).subplots()
    report.draw_lives(axes, rler.Buffer([initial], [], retired))
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert len(names) == 1 + report.MAX_LIVES
    assert names[:2] == ["+ Initial.", "+ Born in step 241."] and names[-1] == "+ Born in step 300."


# ----------------------------------------------------------------------------- what is broken


def change_row(path, **changes):
    rows = [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
    rows[0].update(changes)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


BROKEN = {
    "config.json": [
        b"",
        b"{",
        b"[]",
        b"3",
        b"null",
        b"\xff\xfe",
        b'{"method": 1e999',
        b"[" * 100_000,
    ],
    "metrics.jsonl": [
        b"{\n",
        b"[]\n",
        b"null\n",
        b"{}\n",
        b'{"step": "3"}\n',
        b'{"step": -1}\n',
        b'{"step": true}\n',
        b'{"step": 1e3}\n',
        b'{"step": 1' + b"0" * 400 + b"}\n",
        b'{"step": 1, "reward": "high"}\n',
        b'{"step": 1, "reward": [1]}\n',
        b'{"step": 1, "eval_ci": ["a", 1]}\n',
        b"\xff\xfe\n",
        b"[" * 100_000 + b"\n",
    ],
    "samples.jsonl": [
        b"{\n",
        b"[]\n",
        b"{}\n",
        b'{"step": 1, "split": "test"}\n',
        b'{"step": 1, "split": "train"}\n',
        b'{"step": 1, "split": "train", "verdicts": {}}\n',
        b'{"step": 1, "split": "train", "verdicts": [1]}\n',
        b'{"step": 1, "split": "train", "verdicts": [{"title": 3}]}\n',
        b'{"step": 1, "split": "train", "verdicts": [{"score": "good"}]}\n',
        b'{"step": 1, "split": ["train"], "verdicts": []}\n',
        b'{"step": 1, "split": "train", "verdicts": [], "text": 3}\n',
        b'{"step": 1, "split": "train", "verdicts": [], "reward": "x"}\n',
        b'{"step": null, "split": "train", "verdicts": []}\n',
        b"\xed\xa0\x80\n",
        b'{"a":' * 100_000 + b"\n",
    ],
    "prompts.jsonl": [
        b"{\n",
        b"[]\n",
        b'{"id": 3}\n',
        b'{"id": "cold", "prompt": "x"}\n',
        b'{"id": "cold", "prompt": [1]}\n',
        b'{"id": "cold", "prompt": [{"role": 1}]}\n',
    ],
    "checkpoint/trainer.pt": [b"", b"no state", b"PK\x03\x04 cut", b"\x80\x04."],
}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """A run with everything in it, and its page."""
    path = rler_run(tmp_path_factory.mktemp("whole") / "run")
    report.write_report(path)
    return path


@pytest.mark.parametrize(
    "name, content",
    [(name, content) for name, contents in BROKEN.items() for content in contents],
)
def test_a_broken_file_costs_one_line_and_status_2(whole_run, tmp_path, capsys, name, content):
    path = tmp_path / "run"
    shutil.copytree(whole_run, path)
    page = (path / "report.html").read_bytes()
    (path / name).write_bytes(content)
    assert report.main([str(path)]) == 2
    said, error = capsys.readouterr()
    assert (
        name in error
        and error.startswith("report.py: ")
        and error.count("\n") == 1
        and len(error) < 600
        and not said
    )
    assert (path / "report.html").read_bytes() == page and not list(path.glob("*.tmp"))


def test_odd_values_that_are_no_fault_are_drawn(tmp_path):
    """What a judge, a model or a divided zero may leave in a log."""
    path = heldout_run(
        tmp_path / "run",
        {"cold": ("", 0.2)},
        {"cold": ("x" * 50_000, 0.7)},
        [{"step": 1, "reward": 1e308}, {"step": 2, "reward": -1e308, "kl": 10**400}],
    )
    with open(path / "samples.jsonl", "a") as file:
        file.write(
            '{"step": 1, "split": "train", "id": "p", "verdicts": [], "reward": NaN, '
            '"advantage": Infinity}\n'
        )
        file.write(
            '{"step": 1, "split": "train", "verdicts": [{"title": "$\\\\frac{$", "weight": 1e308, '
            '"score": 0.5}]}\n'
        )
        file.write('{"step": 2, "split": "tr')
    with open(path / "config.json", "w") as file:
        file.write('{"method": ["a"], "seed": {"b": 1}, "judge": null}')
    report.write_report(path)
    text = (path / "report.html").read_text(encoding="utf8")
    assert (
        "not scored" in text
        and "met by 0.5" in text
        and f"{50_000 - report.MAX_CHARACTERS} more characters" in text
    )


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], "the following arguments are required: run"),
        (["x", "--picture"], "unrecognized arguments: --picture"),
        (["nowhere"], "nowhere: no run there (no config.json)"),
        (["RUN", "--out", "FILE"], "a file that is no picture"),
        (["RUN", "--out", "FILE/below.png"], "cannot be written"),
        (["RUN", "--rubrics"], "no checkpoint with evolving rubrics"),
    ],
)
def test_bad_flags_cost_one_line_and_status_2(tmp_path, capsys, flags, words):
    run = heldout_run(tmp_path / "run", {"cold": ("worse", 0.2)}, {"cold": ("better", 0.7)})
    (tmp_path / "notes.md").write_text("mine")
    flags = [
        flag.replace("RUN", str(run)).replace("FILE", str(tmp_path / "notes.md"))
        for flag in flags
    ]
    assert report.main(flags) == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("report.py: ") and error.count("\n") == 1
    assert (tmp_path / "notes.md").read_text() == "mine"


def start(*flags, **more):
    return subprocess.run(
        [sys.executable, ROOT / "tools" / "report.py", *map(str, flags)],
        text=True,
        timeout=120,
        check=False,
        **more,
    )


def test_a_reader_may_leave_early(tmp_path):
    path = rler_run(tmp_path / "run")
    reader, writer = os.pipe()
    os.close(reader)  # as `| head -1` once it has its line
    done = start(path, "--rubrics", stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert done.returncode == 0 and done.stderr == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux")
def test_a_full_disk_is_one_line_and_the_old_page_stays(server, tmp_path):
    path = rler_run(tmp_path / "run")
    with open("/dev/full", "w") as full:
        done = start(path, "--rubrics", stdout=full, stderr=subprocess.PIPE)
    assert (
        done.returncode == 2
        and done.stderr.startswith("report.py: ")
        and done.stderr.count("\n") == 1
    )

    report.write_report(path)
    page = (path / "report.html").read_bytes()
    for size in (0, 30_000):
        log = tmp_path / f"log-{size}"
        process = server.Process(target=report_with_little_room, args=(size, path, log))
        process.start()
        process.join()
        printed = log.read_text(encoding="utf8")
        assert process.exitcode == 2 and "cannot be written" in printed and printed.count("\n") == 1
        assert (path / "report.html").read_bytes() == page and not list(path.glob("*.tmp"))


def report_with_little_room(size, path, log):
    """report.py where no file can grow beyond `size` bytes; its words go to the log afterwards."""
    printed = io.StringIO()
    sys.stdout = sys.stderr = printed
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    status = report.main([str(path)])
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    log.write_text(printed.getvalue(), encoding="utf8")
    os._exit(status)


def test_docstring_examples_and_help():
    failed, tried = doctest.testmod(report)
    assert failed == 0 and tried > 0
    done = start("--help", capture_output=True)
    assert done.returncode == 0 and "python tools/report.py RUN RUN RUN" in done.stdout
