"""Rows as people have them: read right, or refused in one line that names the place."""

import copy
import gzip
import json
import random
import time
from dataclasses import asdict
from types import SimpleNamespace

import pytest
from conftest import HEALTHBENCH
from test_rar import GOOD, with_criterion, write

import rar
from judge import LexicalJudge
from rar import Criterion, DataError


def read_one(path, row):
    """The example of a file with one row."""
    [example] = rar.read_examples(write(path, row))
    return example


def refusal(path):
    """The one line by which a file is refused."""
    with pytest.raises(DataError) as error:
        rar.read_examples(path)
    message = str(error.value)
    assert "\n" not in message and len(message) < 600 and str(path) in message
    return message


# ------------------------------------------------------------------------- null columns

# Columns of all the formats there are: a table that was joined from several has them in every row.
ROW_COLUMNS = [
    "id", "prompt_id", "question", "prompt", "reference", "reference_answer", "rubric",
    "rubrics", "Rubrics", "rubric_list", "rubric_items", "reward_model", "ground_truth",
    "messages", "binary_labels", "answer_idx", "answer", "options", "Question",
    "Correct Answer", "topic", "ability", "example_tags", "canary", "ideal_completions_data", "data_source",
]  # fmt: skip
ITEM_COLUMNS = [
    "text", "criterion", "description", "weight", "points", "title", "category", "axis", "tags",
    "check", "verifier", "rubric_item",
]  # fmt: skip


def with_null_columns(row):
    """The row with every column of every format, null where the row has none."""
    full = dict.fromkeys(ROW_COLUMNS) | copy.deepcopy(row)
    key = "rubrics" if "rubrics" in row else "rubric"
    full[key] = [dict.fromkeys(ITEM_COLUMNS) | item for item in full[key]]
    if isinstance(full["prompt"], list):
        full["prompt"] = [{"name": None, "tool_calls": None} | m for m in full["prompt"]]
    return full


@pytest.mark.parametrize("row", [GOOD, HEALTHBENCH], ids=["ours", "healthbench"])
def test_null_columns_change_nothing(tmp_path, row):
    plain = read_one(tmp_path / "a.jsonl", row)
    assert read_one(tmp_path / "b.jsonl", with_null_columns(row)) == plain


@pytest.mark.parametrize("description", [None, "", "Pitfall Criteria: about the doctor."])
@pytest.mark.parametrize("key", ["text", "criterion"])
def test_a_column_named_description_never_turns_the_sign(tmp_path, description, key):
    """The kind of fault that once paid for what it should punish."""
    never = "Never tells the reader when to see a doctor."
    fault = {key: never, "weight": -4, "category": "Pitfall", "description": description}
    row = {**GOOD, "rubric": [GOOD["rubric"][0], fault]}
    _, criterion = read_one(tmp_path / "a.jsonl", row).rubric
    assert (criterion.text, criterion.weight, criterion.category) == (never, -4, "Pitfall")
    assert rar.explicit_reward([criterion], [1.0]) == 0.0


def test_points_beside_an_empty_weight(tmp_path):
    item = {"criterion": "Names rest.", "points": 3, "weight": None, "text": None}
    example = read_one(tmp_path / "a.jsonl", {**GOOD, "rubric": [item]})
    assert (example.rubric[0].text, example.rubric[0].weight) == ("Names rest.", 3.0)


def test_our_own_text_wins_over_another_column(tmp_path):
    item = {"criterion": "C-17", "text": "Names rest.", "points": 9, "weight": 2}
    [criterion] = read_one(tmp_path / "a.jsonl", {**GOOD, "rubric": [item]}).rubric
    assert (criterion.text, criterion.weight) == ("Names rest.", 2)


def test_what_a_row_says_itself_wins_over_what_is_derived(tmp_path):
    row = with_criterion(axis="completeness", tags=["axis:accuracy"])
    row |= {"prompt_id": "p", "topic": "life", "example_tags": ["theme:care"]}
    row |= {"ideal_completions_data": {"ideal_completion": "Sleep."}}
    example = read_one(tmp_path / "a.jsonl", row)
    assert example.rubric[0].axis == "completeness" and example.reference == "Rest."
    assert example.tags == ["theme:care"] and example.id == "p"


@pytest.mark.parametrize("tags", [{"axis": "accuracy"}, [{"axis": "accuracy", "level": 3}]])
def test_tags_as_an_object(tmp_path, tags):
    item = {"criterion": "Names rest.", "points": 3, "tags": tags}
    criterion = read_one(tmp_path / "a.jsonl", {**GOOD, "rubric": [item]}).rubric[0]
    assert criterion.axis == "accuracy" and criterion.tags[0] == "axis:accuracy"


def test_an_empty_cell_of_a_table_is_no_text(tmp_path):
    """nan is how some writers of tables spell it."""
    nan = float("nan")
    row = with_criterion(axis=nan, title=nan, tags=[nan, {"axis": nan}]) | {"reference": nan}
    example = read_one(tmp_path / "a.jsonl", row)
    assert example.rubric[0].tags == []
    assert example.reference == "" and example.rubric[0].axis == example.rubric[0].title == ""


def test_an_id_of_zero_is_an_id(tmp_path):
    path = write(tmp_path / "a.jsonl", {**GOOD, "id": 0}, {**GOOD, "id": None}, {**GOOD, "id": 1})
    assert [example.id for example in rar.read_examples(path)] == ["0", "a.jsonl:2", "1"]


# ------------------------------------------------------------------------- hostile values


WEIGHTS = [1e308, -1e308, 1e10, 10**400, -(10**4000), 1e-300, -1e-300, 5e-324, 9e-7]


@pytest.mark.parametrize("weight", WEIGHTS)
def test_weights_that_overflow_summed_or_divided_are_refused(tmp_path, weight):
    path = write(tmp_path / "a.jsonl", with_criterion(weight=weight))
    assert "criterion 1: weight " in refusal(path)


@pytest.mark.parametrize("method", ["points", "explicit"])
def test_the_most_unequal_weights_allowed_give_finite_advantages(tmp_path, method):
    items = [{"text": "Names rest.", "weight": rar.MIN_WEIGHT}]
    for number in range(100):
        items.append({"text": f"Names fault {number}.", "weight": -rar.MAX_WEIGHT})
    example = read_one(tmp_path / "a.jsonl", {**GOOD, "rubric": items})
    config = SimpleNamespace(method=method, advantage="std")
    asked = rar.RubricReward(LexicalJudge(), config)

    # One rollout commits every fault, the other none.
    rewards = asked.aggregate(example.rubric, [[1.0] * 101, [1.0] + [0.0] * 100])
    rollouts = [SimpleNamespace(reward=reward) for reward in rewards]
    [advantages] = asked.advantages([rar.Group(example, rollouts)])
    assert advantages == pytest.approx([-1.0, 1.0])


@pytest.mark.parametrize("name", ["weight", "text", "rubric", "id", "role", "tags", "x" * 500])
def test_a_name_given_twice_is_refused_with_its_line(tmp_path, name):
    """Of "weight": 5, "weight": -5 the last counted."""
    message = {"role": "user", "content": "Cold?"}
    line = json.dumps(with_criterion(tags=[]) | {"prompt": [message], "x" * 500: 1})
    twice = line.replace(f'"{name}":', f'"{name}": null, "{name}":', 1)
    assert twice != line
    said = refusal(write(tmp_path / "a.jsonl", line, twice))
    assert "a.jsonl:2: " in said and f"name '{name[:60]}' is given twice" in said
    listed = tmp_path / "a.json"
    listed.write_text(f"[{twice}]")
    assert f"name '{name[:60]}' is given twice" in refusal(listed)


CHECKERS = [
    {"text": "change_case:english_capital"},
    {"tags": {"verifier": "rule", "function": "c", "parameters": "{}"}},
    {"verifier": "rule"},
]


@pytest.mark.parametrize("change", CHECKERS)
def test_a_checker_is_no_statement(tmp_path, change):
    assert "name of a checker" in refusal(write(tmp_path / "a.jsonl", json.dumps(with_criterion(**change))))
    # With a check of ours it is decided by counting.
    [criterion] = read_one(tmp_path / "b.jsonl", with_criterion(**change, check="words <= 9")).rubric
    assert criterion.check == "words <= 9"


@pytest.mark.parametrize("key, meant", [("chek", "check"), ("wieght", "weight"), ("tittle", "title"), ("Axis", "axis")])
def test_a_misspelt_key_is_refused(tmp_path, key, meant):
    """Without its check a criterion would be judged in place of counted."""
    row = with_criterion(**{key: "words <= 9"})
    row["rubric"][0].pop(meant, None)
    assert f"'{key}' is no key; did you mean '{meant}'?" in refusal(write(tmp_path / "a.jsonl", json.dumps(row)))


def test_a_column_of_ones_own_is_no_misspelt_key(tmp_path):
    columns = {"source": "x", "criterion_id": 3, "criteria": "safety", "subcategory": "x", "category_id": 3, "checked": True}
    columns |= {"checker": "model", "tag": "x", "weighted": True, "point": None, "chek": None, "texts": []}
    assert read_one(tmp_path / "a.jsonl", with_criterion(**columns)).rubric


def test_rows_without_an_id_are_called_by_their_place_below_the_folder(tmp_path):
    line = json.dumps(with_criterion() | {"id": None})
    for name in ("a/rows.jsonl", "b/rows.jsonl", "rows.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, line)
    assert sorted(e.id for e in rar.read_examples(tmp_path)) == ["a/rows.jsonl:1", "b/rows.jsonl:1", "rows.jsonl:1"]
    assert [e.id for e in rar.read_examples(tmp_path / "a" / "rows.jsonl")] == ["rows.jsonl:1"]


def test_numbers_of_thousands_of_digits_are_refused(tmp_path):
    line = json.dumps(with_criterion(weight=77777)).replace("77777", "7" * 5000)
    assert "a.jsonl:1: " in refusal(write(tmp_path / "a.jsonl", line))


def test_deeply_nested_tags_are_read_or_refused(tmp_path):
    nested = "axis:accuracy"
    for _ in range(500):
        nested = [nested]
    [criterion] = read_one(tmp_path / "a.jsonl", with_criterion(tags=nested)).rubric
    assert criterion.tags == ["axis:accuracy"]
    objects = "x"
    for _ in range(500):
        objects = {"a": objects}
    [criterion] = read_one(tmp_path / "b.jsonl", with_criterion(tags=objects)).rubric
    assert criterion.tags == ["a:" * 500 + "x"]
    deep = json.dumps(with_criterion(tags=["@"])).replace('"@"', "[" * 99_999 + "]" * 99_999)
    assert "not a line of JSON" in refusal(write(tmp_path / "c.jsonl", deep))


WORDS = ["Avoids ", "never ", "The response ", "at most ", "((", "\\boxed{", "9", "Does not "]


@pytest.mark.parametrize("word", WORDS)
def test_long_repeated_text_is_neither_slow_nor_a_traceback(tmp_path, word):
    started = time.perf_counter()
    text = (word * 20_000).strip()
    example = read_one(tmp_path / "a.jsonl", with_criterion(text=text) | {"question": text})
    assert example.rubric[0].text == example.question == text
    rar.names_avoidance(text)

    # And judged: the text as criterion, good and bad, and as the response.
    items = [Criterion(text, 1), Criterion(text, -1), Criterion("x", 1, check="copied <= 0.5")]
    example.rubric = items
    rollouts = [SimpleNamespace(text=text), SimpleNamespace(text="Rest.")]
    config = SimpleNamespace(method="points", advantage="std")
    rar.RubricReward(LexicalJudge(), config).score([rar.Group(example, rollouts)])
    assert rollouts[1].verdicts[2].score == 1.0
    assert time.perf_counter() - started < 10  # tenths of a second on an idle machine


SURROGATE = "half \ud83d a smiley"


@pytest.mark.parametrize(
    "row",
    [
        {**GOOD, "id": SURROGATE},
        {**GOOD, "question": SURROGATE},
        {**GOOD, "reference": SURROGATE},
        {**GOOD, "canary": SURROGATE},
        {**GOOD, "topic": SURROGATE},
        {**GOOD, "example_tags": [SURROGATE]},
        {**GOOD, "prompt": [{"role": SURROGATE, "content": "x"}]},
        {**GOOD, "prompt": [{"role": "user", "content": SURROGATE}]},
        with_criterion(text=SURROGATE),
        with_criterion(title=SURROGATE),
        with_criterion(axis=SURROGATE),
        with_criterion(category=SURROGATE),
        with_criterion(check=SURROGATE),
        with_criterion(tags=[SURROGATE]),
        with_criterion(tags={SURROGATE: "x"}),
    ],
)
def test_half_a_character_is_refused_wherever_it_stands(tmp_path, row):
    message = refusal(write(tmp_path / "a.jsonl", row))
    assert "half a character" in message
    message.encode()  # printable itself


def test_a_pair_of_surrogates_is_a_character(tmp_path):
    row = {**GOOD, "question": "a \U0001f600 smile"}
    assert "\\ud83d\\ude00" in json.dumps(row)
    assert read_one(tmp_path / "a.jsonl", row).question == "a \U0001f600 smile"


def test_a_broken_archive_is_one_line(tmp_path):
    rng = random.Random(0)
    lines = [json.dumps({**GOOD, "id": str(rng.random())}) + "\n" for _ in range(4000)]
    whole = gzip.compress("".join(lines).encode())
    path = tmp_path / "a.jsonl.gz"
    middle = len(whole) // 2
    flipped = bytes(byte ^ 255 for byte in whole[middle : middle + 9])
    damaged = whole[:middle] + flipped + whole[middle + 9 :]
    for content in (whole[:-9], whole[:middle], damaged, whole[:-4] + b"\0\0\0\0", b"PK not gzip"):
        path.write_bytes(content)
        message = refusal(path)
        assert "cannot be read" in message or "not a line of JSON" in message
    path.write_bytes(whole[:-9])
    assert "cannot be read" in refusal(path)
    path.write_bytes(b"")
    assert "no rows" in refusal(path)


def test_a_folder_named_like_a_file_is_a_folder(tmp_path):
    (tmp_path / "rows.jsonl").mkdir()
    write(tmp_path / "rows.jsonl" / "a.jsonl", GOOD)
    assert len(rar.read_examples(tmp_path)) == 1


# ------------------------------------------------------------------------- random rows

ODD_VALUES = [
    None, "", " ", [], {}, 0, -1, 1.5, True, False, 1e308, 10**30, float("nan"), float("inf"),
    "text", "\ud800", "\u2028", "x" * 5000, ["a"], [None], [[["a"]]], {"a": 1}, {"a": {"b": None}},
    [{"role": "user", "content": "Hi"}], [{"role": "user"}], [{"text": "A.", "weight": 1}],
    [{"criterion": "A.", "points": -1}], "axis:accuracy", "words <= 40", "words <=", "boxed",
    'contains "', "Pitfall", "pitfall ", "essential",
]  # fmt: skip


def places_of(value, path=()):
    """The paths to everything inside a JSON value."""
    places = [path] if path else []
    if isinstance(value, dict):
        for key, inner in value.items():
            places += places_of(inner, (*path, key))
    if isinstance(value, list):
        for number, inner in enumerate(value):
            places += places_of(inner, (*path, number))
    return places


def mutated(rng, row):
    """The row with one to three values replaced, dropped, doubled or added."""
    row = copy.deepcopy(row)
    for _ in range(rng.randint(1, 3)):
        places = places_of(row)
        if not places:
            break
        *path, last = rng.choice(places)
        inside = row
        for key in path:
            inside = inside[key]
        change = rng.choice(["replace", "replace", "drop", "double", "add"])
        if change == "replace":
            inside[last] = copy.deepcopy(rng.choice(ODD_VALUES))
        elif change == "drop":
            del inside[last]
        elif isinstance(inside, list):
            inside.insert(last, copy.deepcopy(inside[last]))
        else:
            name = rng.choice([*ROW_COLUMNS, *ITEM_COLUMNS])
            inside[name] = copy.deepcopy(rng.choice(ODD_VALUES))
    return row


def random_value(rng, depth=0):
    """Any JSON value, with the names of columns among its keys."""
    kind = rng.random()
    if depth > 3 or kind < 0.4:
        return copy.deepcopy(rng.choice(ODD_VALUES))
    if kind < 0.6:
        return [random_value(rng, depth + 1) for _ in range(rng.randint(0, 3))]
    names = rng.sample([*ROW_COLUMNS, *ITEM_COLUMNS, "role", "content"], rng.randint(1, 6))
    return {name: random_value(rng, depth + 1) for name in names}


def assert_sound(example):
    """What every other part of the project relies on."""
    assert isinstance(example.id, str) and example.id
    assert isinstance(example.question, str) and isinstance(example.reference, str)
    assert any(criterion.weight > 0 for criterion in example.rubric)
    json.dumps(asdict(example), ensure_ascii=False).encode()
    for criterion in example.rubric:
        assert criterion.text.strip() == criterion.text != ""
        assert type(criterion.weight) is float and 0 < abs(criterion.weight) <= 1e9
        assert all(isinstance(tag, str) for tag in criterion.tags)
        fault = criterion.category.lower() == "pitfall"
        signed = fault == (criterion.weight < 0)
        avoided = rar.names_avoidance(criterion.text, criterion.title)
        assert not criterion.category or signed or avoided
    scores = [1.0] * len(example.rubric)
    assert 0 <= rar.explicit_reward(example.rubric, scores) <= 1
    assert rar.points_reward(example.rubric, scores) <= 1
    rar.axis_scores(example.rubric, scores)


def check_random_rows(count, seed):
    """Of so many by this seed: a sound example or a DataError of one line, nothing else."""
    rng = random.Random(seed)
    bases = [GOOD, HEALTHBENCH, with_null_columns(GOOD), with_null_columns(HEALTHBENCH)]
    counts = {"read": 0, "refused": 0}
    for number in range(count):
        row = random_value(rng) if number % 4 == 0 else mutated(rng, rng.choice(bases))
        try:
            # Through text, as a file would have it.
            parsed = rar.parse_json(json.dumps(row).encode(), f"f.jsonl:{number}")
            assert_sound(rar.parse_example(parsed, f"f.jsonl:{number}"))
            counts["read"] += 1
        except DataError as error:
            message = str(error)
            assert message.startswith(f"f.jsonl:{number}: ")
            assert "\n" not in message and len(message) < 800
            counts["refused"] += 1
    assert min(counts.values()) > count / 5, counts


def test_random_and_mutated_rows_are_read_or_refused():
    check_random_rows(2_000, seed=0)


@pytest.mark.long
def test_twelve_thousand_rows_are_read_or_refused():
    check_random_rows(12_000, seed=1)


# ------------------------------------------------------------------------- a second reading


def plain_tags(value):
    """HealthBench's tags, which some files nest."""
    if isinstance(value, list):
        tags = []
        for inner in value:
            tags += plain_tags(inner)
        return tags
    return [value]


def plain_healthbench(row):
    """HealthBench's row by its published description, written without a look at rar.py."""
    rubric = []
    for item in row["rubrics"]:
        tags = plain_tags(item["tags"])
        [axis] = [tag[len("axis:") :] for tag in tags if tag.startswith("axis:")]
        rubric.append((item["criterion"].strip(), item["points"], axis, tags))
    ideal = (row.get("ideal_completions_data") or {}).get("ideal_completion") or ""
    messages = [(message["role"], message["content"]) for message in row["prompt"]]
    return {
        "id": row["prompt_id"],
        "messages": messages,
        "rubric": rubric,
        "tags": plain_tags(row["example_tags"]),
        "reference": ideal,
        "canary": row.get("canary") or "",
    }


def as_plain(example):
    """What rar.py read, in the same shape."""
    rubric = []
    for c in example.rubric:
        assert c.title == c.category == c.check == ""  # nothing is guessed
        rubric.append((c.text, c.weight, c.axis, c.tags))
    return {
        "id": example.id,
        "messages": [(message["role"], message["content"]) for message in example.prompt],
        "rubric": rubric,
        "tags": example.tags,
        "reference": example.reference,
        "canary": example.canary,
    }


def test_healthbench_is_read_as_an_independent_reading_reads_it(shared):
    path = shared("healthbench_200.jsonl")
    rows = []
    for line in path.read_bytes().split(b"\n"):
        if line.strip():
            rows.append(json.loads(line))
    examples = rar.read_examples(path)
    assert len(rows) == len(examples) == 200
    for row, example in zip(rows, examples):
        assert as_plain(example) == plain_healthbench(row)


def test_healthbench_is_read_the_same_with_odd_texts_and_null_columns(shared, tmp_path):
    rng = random.Random(1)
    rows = []
    for line in shared("healthbench_200.jsonl").read_bytes().split(b"\n")[:60]:
        row = json.loads(line)
        row["prompt"][-1]["content"] += rng.choice([" \u2028 next", " \x85", " \U0001f600", ' "q"'])
        row["canary"] = rng.choice([None, "a mark"])
        row["ideal_completions_data"] = rng.choice([None, {"ideal_completion": "Rest."}])
        for item in row["rubrics"]:
            tags = item["tags"]
            item["tags"] = rng.choice([tags, [tags], [[tag] for tag in tags]])
            item["points"] = rng.choice([item["points"], float(item["points"])])
        rows.append(row)
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(with_null_columns(row), ensure_ascii=False) for row in rows]
    path.write_bytes("\n".join(lines).encode())
    for row, example in zip(rows, rar.read_examples(path), strict=True):
        assert as_plain(example) == plain_healthbench(row)
