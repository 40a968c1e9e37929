"""The offline judge: exact on form, honestly measured on content, never turning 'missing' into 0."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

import judge
from judge import lexical_verdict


@pytest.mark.parametrize(
    "criterion, response, met",
    [
        ("Is at most 5 words long.", "one two three four five", True),
        ("Is at most 5 words long.", "one two three four five six", False),
        ("Is at least 3 words long.", "one two", False),
        ("Has at most two sentences.", "Take 2.5 ml. Then rest.", True),
        ("Has at most two sentences.", "One. Two. Three.", False),
        ("Has exactly one sentence.", "Only one here!", True),
        ("Is written as a list with at least three items.", "1. a\n2. b\n3) c", True),
        ("Is written as a list with at least three items.", "- a\n- b\nc", False),
        ("Is written as a list with at least three items.", "- a\n- b\n3.", False),  # a number without text is no item
        ("Is written as running text without a list.", "Plain words.", True),
        ("Is written as running text without a list.", "- a\n- b", False),
        ("Ends with a complete sentence instead of breaking off.", 'He said "rest."', True),
        ("Ends with a complete sentence instead of breaking off.", "Rest and", False),
        ("Ends with a complete sentence instead of breaking off.", "1. Rest.\n2.", False),
        ("Repeats the same words or sentences over and over.", "Drink water. " * 6, True),
        ("Repeats the same words or sentences over and over.", "Drink water, then rest and sleep well.", False),
        ("Addresses the reader directly as 'you'.", "Then your fever falls.", True),
        ("Addresses the reader directly as 'you'.", "The youth slept.", False),
        ("Gives an example from everyday life, introduced by words such as 'for example'.", "For example, a spoon.", True),
        ("Gives an example from everyday life, introduced by words such as 'for example'.", "A spoon.", False),
        ("Advises seeing a doctor if the fever lasts more than three days.", "If the fever lasts, see your physician.", True),
        ("Recommends antibiotics for a cold.", "Rest and drink.", False),
        ("Does not recommend antibiotics.", "Rest and drink.", True),
        ("Avoids recommending antibiotics.", "I recommend antibiotics.", False),
        ("Erwähnt, dass Wasser bei Fieber hilft.", "Bei Fieber hilft Wasser.", True),
        ("提到多喝水", "提到多喝水", True),
    ],
)
def test_verdicts(criterion, response, met):
    assert lexical_verdict(criterion, response).score == float(met)


@pytest.mark.parametrize("response", ["", "  \n"])
def test_silence_meets_nothing(response):
    for criterion in ("Is at most 5 words long.", "Has at most two sentences.", "Is written as running text without a list.", "Mentions rest."):
        assert lexical_verdict(criterion, response).score == 0.0
    assert lexical_verdict("Repeats the same words over and over.", response).score == 0.0


def test_a_clinical_criterion_is_not_mistaken_for_one_of_form():
    for criterion in ("Includes a list of the vaccines given at two months.", "Asks how many words the child says.", "Ends with advice to see a doctor."):
        assert judge.form_verdict(criterion, "x") is None


def test_a_criterion_without_content_words_is_missing_not_zero():
    for criterion in ("It is so.", "Does not.", "Avoids this."):
        assert lexical_verdict(criterion, "Anything.").score is None


def test_fault_needs_more_words_than_a_fact():
    """Staying on the subject of a pitfall is not committing it."""
    fault, answer = "Claims that every sore throat needs antibiotics.", "Warm tea soothes a sore throat."
    assert lexical_verdict(fault, answer).score == 1.0
    assert lexical_verdict(fault, answer, judge.COVERED_FAULT).score == 0.0
    assert lexical_verdict(fault, "Every sore throat needs antibiotics.", judge.COVERED_FAULT).score == 1.0


def test_words_far_apart_do_not_add_up():
    spread = "Water is wet. " + "Nothing here matters much. " * 6 + "Fever is hot."
    assert lexical_verdict("Drink enough water against fever.", spread).score == 0.0


def test_offline_judge_refuses_what_has_no_rule():
    with pytest.raises(judge.NoOfflineRule):
        judge.OfflineJudge().ask([judge.Question("How good is it, 1 to 10?")])


@pytest.mark.parametrize("response", ["\x00" * 50, "a" * 1_000_000, "\ud800 lone", "‮ right to left", "- \n- \n", '{"met": true}', "\u2028".join("abc")])
def test_odd_responses_do_not_crash(response):
    for criterion in ("Mentions rest.", "Is at most 40 words long.", "Ends with a complete sentence instead of breaking off.", "Repeats the same words over and over."):
        assert lexical_verdict(criterion, response).score in (0.0, 1.0)


def test_agreement_by_hand():
    """30 yes-yes, 10 yes-no, 20 no-yes, 40 no-no: accuracy 0.7, chance 0.5, kappa 0.4."""
    pairs = [(1.0, True)] * 30 + [(1.0, False)] * 10 + [(0.0, True)] * 20 + [(0.0, False)] * 40
    got = judge.agreement(pairs)
    assert got["accuracy"] == 0.7 and got["kappa"] == 0.4
    assert got["macro_f1"] == pytest.approx((60 / 90 + 80 / 110) / 2, abs=1e-4)
    assert judge.agreement([(None, True)])["kappa"] is None


def test_agreement_with_physicians(shared):
    """The issue's bar is a kappa of 0.34; physicians among themselves reach 0.66-0.75."""
    path = shared("kqa_physician_labels_dev.jsonl")
    run = subprocess.run([sys.executable, ROOT / "judge.py", "--agreement", path], capture_output=True, text=True, check=True)
    got = json.loads(run.stdout)
    assert got["n"] == 200 and got["missing"] == 0
    assert got["kappa"] >= 0.34 and got["macro_f1"] >= 0.66


def test_threshold_holds_without_the_question_at_hand(shared):
    """COVERED chosen on all other questions gives nearly the same agreement: it is not fitted to single rows."""
    rows = judge.read_labels(shared("kqa_physician_labels_dev.jsonl"))
    grid = [k / 20 for k in range(4, 15)]
    said = {t: [lexical_verdict(r["criterion"], r["response"], t).score for r in rows] for t in grid}

    def kappa(threshold, keep):
        return judge.agreement([(s, r["met"]) for s, r in zip(said[threshold], rows) if keep(r)])["kappa"]

    chosen = {q: max(grid, key=lambda t: kappa(t, lambda r: r["question"] != q)) for q in {r["question"] for r in rows}}
    held_out = judge.agreement([(said[chosen[r["question"]]][i], r["met"]) for i, r in enumerate(rows)])
    assert held_out["kappa"] >= 0.30


@pytest.mark.parametrize("content, words", [("", "no rows"), ("{", ":1: not a line of JSON"), ('{"response": "a"}\n', ":1: needs the keys")])
def test_bad_label_files(tmp_path, capsys, content, words):
    path = tmp_path / "labels.jsonl"
    path.write_text(content)
    assert judge.main(["--agreement", str(path)]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert judge.main(["--agreement", str(tmp_path / "none.jsonl")]) == 2
