"""report.html and --plot, looked at by a parser and, where there is one, by a real browser."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from test_train import lines, run

import grpo
import rar
import train
from judge import Verdict

HOSTILE = '</pre><script>document.title="owned"</script><img src=x onerror=\'document.title="owned"\'>"&amp; <b>{record}{nonce}</b>\u2028'


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


def hostile_run(tmp_path):
    """A run's folder whose every text is hostile, written by the functions that write real ones."""
    example = rar.Example(HOSTILE, [{"role": "user", "content": HOSTILE}], [rar.Criterion(HOSTILE, 2, HOSTILE), rar.Criterion("x", -1, "Fault"), rar.Criterion("y", 1, "Gone")])
    rollout = grpo.Rollout([1], [2, 3], [0.0, 0.0], "stop", HOSTILE, example.rubric, [Verdict(1.0, HOSTILE), Verdict(1.0, "no"), Verdict(None, "cut")], 0.5, -0.7)
    made = train.Run(tmp_path / "run", train.Config(model=HOSTILE), [example])
    for step in (1, 2, 3):
        made.samples(step, "train", [(example, [rollout])])
        made.append("metrics.jsonl", [{"step": step, "reward": 0.5, "reward_std": 0.1, "kl": 0.0, "completion_tokens": 2.0}])
    made.samples(3, "heldout", [(example, [rollout])])
    train.report(made)
    return tmp_path / "run" / "report.html"


def record_of(text):
    """The JSON in the page."""
    return json.loads(re.search(r'<script type="application/json" id="record">(.*?)</script>', text, re.S)[1])


def test_a_hostile_completion_stays_text(tmp_path):
    text = hostile_run(tmp_path).read_text(encoding="utf8")
    page = Page(text)
    scripts = [attrs for tag, attrs in page.tags if tag == "script"]
    assert [list(attrs) for attrs in scripts] == [["type", "id"], ["nonce"]]  # the record, and the page's own
    assert not {"b", "iframe", "link", "img", "pre"} & {tag for tag, _ in page.tags}  # nothing else before the script has run
    assert not any(key.startswith("on") for _, attrs in page.tags for key in attrs)
    record = record_of(text)
    assert [name for name, _ in record["rollouts"]] == ["Rollouts of training step 1", "Rollouts of training step 3", "Held-out answers at step 3"]
    [row] = record["rollouts"][0][1]
    assert row["text"] == row["id"] == row["verdicts"][0]["title"] == row["verdicts"][0]["reason"] == HOSTILE
    assert record["prompts"][HOSTILE][0]["content"] == HOSTILE
    assert not re.search(r"(src|href)=.?https?://|@import|fetch\(|innerHTML|insertAdjacentHTML|document\.write", text)


def test_the_pages_policy_allows_its_own_script_and_nothing_else(tmp_path):
    """By a number that differs from page to page, and that a text which asks for it does not get."""
    numbers = set()
    for folder in ("a", "b"):
        text = hostile_run(tmp_path / folder).read_text(encoding="utf8")
        [number] = re.findall(r"script-src 'nonce-([0-9a-f]{32,})'", text)
        assert "default-src 'none'" in text and text.count(number) == 2 and f'<script nonce="{number}">' in text
        numbers.add(number)
    assert len(numbers) == 2


def test_a_real_run_has_its_page(tiny, few, tmp_path):
    assert run(tiny, few, tmp_path / "run") == 0
    record = record_of((tmp_path / "run" / "report.html").read_text(encoding="utf8"))
    assert [len(rows) for _, rows in record["rollouts"]] == [6, 6, 2, 2]  # the first and the last step, the first and the last evaluation
    assert record["rollouts"][-1][1][-1]["text"] == lines(tmp_path / "run" / "samples.jsonl")[-1]["text"]
    assert [row["step"] for row in record["metrics"]] == [0, 1, 2, 3] and "steps 3" in record["settings"]


def chromium(tmp_path, width, *what):
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync", "--disable-component-update",
             f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900"]  # fmt: skip
    return subprocess.run(["chromium", *flags, *what], capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium")
@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_real_browser(tmp_path, width):
    """What the browser has made of the page: every hostile text is text, and each verdict has its colour."""
    path = hostile_run(tmp_path)
    dumped = chromium(tmp_path, width, "--dump-dom", path.as_uri())
    assert re.search(r"<title>(.*?)</title>", dumped)[1] == "explicit, seed 0: run"  # no other script has changed it
    page = Page(dumped)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 2 and tags.count("details") == 3 and not {"b", "iframe", "img"} & set(tags)
    assert not any(key.startswith("on") for _, attrs in page.tags for key in attrs)
    shown = [t for t in page.text if t == HOSTILE]
    assert len(shown) >= 3 * 3  # of each rollout the response, a criterion's title and the judge's reason
    kinds = [attrs["class"] for tag, attrs in page.tags if tag == "tr" and "class" in attrs]
    assert kinds[:3] == ["good", "bad", "none"]
    for cell in ("+2", "2", "-1", "missing", "reward +0.500, advantage -0.700, 2 tokens, stop", "Rollouts of training step 1"):
        assert cell in page.text
    assert dumped.count("<figure>") == 4 and dumped.count("<circle") == 12  # three panels that have values and the chosen metric
    shot = tmp_path / "shot.png"
    chromium(tmp_path, width, f"--screenshot={shot}", path.as_uri())
    assert shot.read_bytes()[:4] == b"\x89PNG"


def test_runs_are_compared_in_a_picture(tiny, few, tmp_path, capsys):
    for seed, method in ((0, "explicit"), (1, "explicit"), (0, "points")):
        assert run(tiny, few, tmp_path / f"{method}{seed}", "--seed", str(seed), "--method", method) == 0
    folders = [str(tmp_path / name) for name in ("explicit0", "explicit1", "points0")]
    assert train.main(["--plot", ",".join(folders), "--out", str(tmp_path / "commas.png")]) == 0
    capsys.readouterr()
    assert train.main(["--plot", *folders, "--out", str(tmp_path / "runs.png")]) == 0
    assert "3 runs" in capsys.readouterr().out and (tmp_path / "runs.png").read_bytes()[:4] == b"\x89PNG"
    assert train.main(["--plot", str(tmp_path / "nothing")]) == 2
    assert "no run there" in capsys.readouterr().err
    assert json.loads((tmp_path / "explicit0" / "config.json").read_text())["plot"] == ""
