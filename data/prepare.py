"""Turns rows as other people publish them into rows that `rar.read_examples` reads.

    python data/prepare.py SOURCE --out FILE.jsonl [--max_bad 0.02] [--force]

SOURCE is a .jsonl, .jsonl.gz, .json (one list), .csv or .parquet file, a folder of these, or a data set of
the Hugging Face hub: owner/name, owner/name:split, owner/name:config or owner/name:config:split. Parquet
files and the hub need a package (pip install datasets).

    python data/prepare.py healthbench.jsonl --out hb.jsonl
    python data/prepare.py ScaleAI/RaR-Medicine:train --out rar.jsonl
    python data/prepare.py Idavidrein/gpqa:gpqa_diamond:train --out gpqa.jsonl

Formats, told apart by the values of a row; a column that is null, or is not listed here, changes nothing:

    HealthBench        prompt, rubrics: criterion, points, tags      also Professional: conversation, rubric_items
    RaR as released    question, rubric: title, description, weight
    RubricHub, verl    prompt or messages, Rubrics or reward_model.rubrics: criterion, points, tags
    ResearchRubrics    prompt, rubrics or rubric_items: criterion, weight, axis
    DR Tulu            messages, ground_truth: JSON text with rubrics (open-instruct's layout)
    ResearchQA         query, rubric: rubric_item, type
    OpenRubrics        instruction, rubric: numbered text
    multiple choice    MedQA: question, options, answer_idx          GPQA: Question, Correct Answer, ...
    our own            question or prompt, rubric: text, weight

What a format leaves open, and what is done here:

1. Polarity. All pitfalls of RaR's released data have negative weights, but 80 % of RaR-Science's forbid the
   fault ("Avoids ..."; good when met) and 88 % of RaR-Medicine's name it ("Recommends ..."; counted by others).
   `rar.names_avoidance` decides; one that is good when met gets a positive weight. In the other formats
   the published sign is the polarity.
2. Weights. ResearchQA and OpenRubrics publish none: every criterion weighs 1.
3. Axis and category stay empty where a format has none. The words that a format uses (ResearchRubrics' axes)
   are copied as they are.
4. Rules. RubricHub names checkers of instruction following ("length_constraints:number_words"). One that
   `judge.parse_check` can express becomes a check; a row with any other checker is skipped. The names of the
   parameters are those of IFEval; RubricHub's own documentation of them is not published.
5. Ids. A row without an id is named after its place: the path below SOURCE, a colon and the line.
"""

import argparse
import csv
import difflib
import gzip
import json
import os
import random
import re
import sys
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import judge  # noqa: E402  (the line above makes the repository's files importable)
import rar  # noqa: E402
from rar import DataError  # noqa: E402

# ----------------------------------------------------------------------------- where rows come from

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet")
HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?(?::([\w.-]+))?")


class Place(NamedTuple):
    """Where a row is from: `file` (or split) as the user knows it, `name` below the source, row number."""

    file: str
    name: str
    number: int

    def __str__(self) -> str:
        return f"{self.file}:{self.number}"


def read_source(source: str) -> Iterator[tuple[Place, object]]:
    """Yields (place, row), one at a time; a line of JSONL as bytes, so that a bad one stops nothing.

    Raises DataError when the source cannot be read at all.
    """
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.name.endswith(SUFFIXES))
        if not files:
            raise DataError(f"{source}: no {', '.join(SUFFIXES)} file in this folder; name another one")
        for file in files:
            yield from read_file(file, file.relative_to(path).as_posix())
        return

    match = HUB_NAME.fullmatch(source)
    if path.is_file():
        yield from read_file(path, path.name)
    elif match and not source.endswith(SUFFIXES):
        yield from read_hub(*match.groups())
    else:
        raise DataError(f"{source}: no such file or folder; a data set of the hub is named owner/name")


def read_file(path: Path, name: str) -> Iterator[tuple[Place, object]]:
    """The rows of one file; `name` is the file's path below the source."""
    readers = {".json": read_json_list, ".csv": read_csv, ".parquet": read_parquet}
    reader = readers.get(path.suffix, read_lines)
    try:
        for number, row in reader(path):
            yield Place(str(path), name, number), row

    # What gzip, csv and the decoders raise for a file that is cut off, damaged or of another kind.
    except (OSError, EOFError, zlib.error, csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); is the file complete?") from None


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a JSONL file, as bytes."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        # Read as bytes, a line ends at "\n" only: as text it would also end at U+2028 inside a string.
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line


def read_json_list(path: Path) -> Iterator[tuple[int, object]]:
    """The items of a .json file that holds one list."""
    rows = parse_json(path.read_bytes())
    if not isinstance(rows, list):
        raise DataError(f"{path}: not a JSON list; a .json file must hold one list of objects")
    yield from enumerate(rows, 1)


def read_csv(path: Path) -> Iterator[tuple[int, dict]]:
    """The rows of a CSV file with a header; an empty cell is a value that is not there."""
    # Prompts outgrow the module's default of 128 kB per cell.
    csv.field_size_limit(2**31 - 1)
    with open(path, newline="", encoding="utf-8-sig") as file:
        for number, cells in enumerate(csv.DictReader(file), 1):
            yield number, {column: text for column, text in cells.items() if text}


def read_parquet(path: Path) -> Iterator[tuple[int, dict]]:
    """The rows of a parquet file."""
    table = load_dataset(str(path), "parquet", data_files=str(path), split="train")
    yield from enumerate(table, 1)


def read_hub(name: str, config: str | None, split: str | None) -> Iterator[tuple[Place, dict]]:
    """The rows of a data set of the hub, split by split."""
    shown = ":".join(part for part in (name, config, split) if part)
    # A single word after the name is a configuration where the data set has one of that name.
    if config and not split and config not in config_names(shown, name):
        config, split = None, config

    splits = load_dataset(shown, name, config) if config else load_dataset(shown, name)
    if split and split not in splits:
        raise DataError(f"{shown}: no split {split!r}; this data set has {', '.join(splits)}")
    for part in [split] if split else list(splits):
        label = ":".join(word for word in (name, config, part) if word)
        for number, row in enumerate(splits[part], 1):
            yield Place(label, label.partition("/")[2], number), row


def load_dataset(shown: str, *args, **options):
    """`datasets.load_dataset`; whatever goes wrong is one line."""
    try:
        import datasets

        return datasets.load_dataset(*args, **options)
    except ImportError:
        need = "parquet files and data sets of the hub need a package (pip install datasets)"
        raise DataError(f"{shown}: {need}; .jsonl, .json and .csv files need none") from None
    # The package raises its own errors, those of its HTTP client and Python's.
    except Exception as error:
        raise DataError(f"{shown}: cannot be loaded: " + str(error).partition("\n")[0]) from None


def config_names(shown: str, name: str) -> list[str]:
    """The configurations of a data set of the hub."""
    try:
        import datasets

        return datasets.get_dataset_config_names(name)
    except ImportError:
        raise DataError(f"{shown}: data sets of the hub need a package (pip install datasets)") from None
    except Exception as error:
        raise DataError(f"{shown}: cannot be loaded: " + str(error).partition("\n")[0]) from None


# ----------------------------------------------------------------------------- values


def parse_json(text: bytes | str) -> object:
    """JSON, or a DataError that says which kind of line was expected."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise DataError("not JSON; each line must hold one JSON object (UTF-8)") from None


def without_nulls(value: object) -> object:
    """The value without nulls at any depth: columnar files add a null for every column a row lacks.

    >>> without_nulls({"text": "Rests.", "description": None, "tags": [None, {"a": None}]})
    {'text': 'Rests.', 'tags': [{}]}
    """
    if isinstance(value, dict):
        cleaned = {}
        for key, inner in value.items():
            # A table library writes nan, which no comparison equals, for a number that is not there.
            if inner is not None and inner == inner:
                cleaned[key] = without_nulls(inner)
        return cleaned
    if isinstance(value, list):
        return [without_nulls(inner) for inner in value if inner is not None]
    return value


def is_text(value: object) -> bool:
    """Whether the value is a text that says something."""
    return isinstance(value, str) and bool(value.strip())


def is_number(value: object) -> bool:
    """Whether the value is a number; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def first_of(row: dict, *keys: str) -> object:
    """The first of the values that is there and not empty, else None."""
    for key in keys:
        value = row.get(key)
        if is_number(value) or value:
            return value
    return None


def unpacked(value: object) -> object:
    """The value, decoded where it is JSON written as text: how tables keep lists and objects."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        value = value[0]
    if not isinstance(value, str) or value.lstrip()[:1] not in ("{", "["):
        return value
    try:
        return without_nulls(json.loads(value))
    except (ValueError, RecursionError):
        return value


def object_of(value: object) -> dict:
    """The value as an object, decoded if need be; empty where it is none."""
    value = unpacked(value)
    return value if isinstance(value, dict) else {}


def items_of(value: object) -> list[dict]:
    """The objects of a list, decoded if need be; empty where the value is no list of objects."""
    value = unpacked(value)
    if not isinstance(value, list):
        return []
    return [item for item in value if isinstance(item, dict)]


def has_items(value: object, *keys: str) -> bool:
    """Whether some object of the list has a text or a number under each key."""
    for item in items_of(value):
        if all(is_text(item.get(key)) or is_number(item.get(key)) for key in keys):
            return True
    return False


def texts_of(tags: object) -> list[str]:
    """All texts in lists of lists of tags; an object {"axis": "accuracy"} is the tag "axis:accuracy".

    >>> texts_of(["level:example", [["axis:accuracy"]], {"cluster": "pain"}])
    ['level:example', 'axis:accuracy', 'cluster:pain']
    """
    texts = []
    waiting = [tags]
    # A loop and a stack: tags nested a thousand deep must not end the program.
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            texts.append(value)
        elif isinstance(value, dict):
            for key, inner in reversed(value.items()):
                if not is_text(inner):
                    raise DataError(f"tag {key!r} is not a text")
                waiting.append(f"{key}:{inner}")
        elif isinstance(value, list):
            waiting.extend(reversed(value))
        elif value is not None:
            raise DataError(f"tag {value!r} is not a text")
    return texts


# ----------------------------------------------------------------------------- our own rows


def own_criterion(
    text: object,
    weight: object,
    title: object = "",
    category: object = "",
    axis: object = "",
    tags: object = None,
    check: str = "",
) -> dict:
    """A criterion in our own format; entries that say nothing are left out. Raises DataError for tags."""
    tags = texts_of(tags)
    # HealthBench keeps the axis among the tags.
    if not axis:
        axes = [tag for tag in tags if tag.startswith("axis:")]
        axis = axes[0].removeprefix("axis:") if axes else ""

    item = {"title": title, "text": text, "category": category, "weight": weight}
    item |= {"axis": axis, "tags": tags, "check": check}
    return {key: value for key, value in item.items() if key == "weight" or value}


def own_row(
    name: str,
    prompt: object,
    rubric: list[dict],
    reference: object = "",
    tags: object = None,
    canary: object = "",
) -> dict:
    """A row in our own format. prompt: a text or chat messages; entries that say nothing are left out."""
    if not isinstance(prompt, (str, list)) or not prompt:
        raise DataError("no prompt; expected a text or chat messages")
    row = {"id": name}
    # One question is easier to read than a list of one message.
    if isinstance(prompt, list) and len(prompt) == 1 and is_single_question(prompt[0]):
        row["question"] = prompt[0]["content"]
    elif isinstance(prompt, list):
        row["prompt"] = [message_of(message) for message in prompt]
    else:
        row["question"] = prompt

    # A number is a reference answer too; an object or a list is something else.
    if is_number(reference) or is_text(reference):
        row["reference"] = str(reference)
    tags = texts_of(tags)
    if tags:
        row["example_tags"] = tags
    if is_text(canary):
        row["canary"] = canary
    row["rubric"] = rubric
    return row


def is_single_question(message: object) -> bool:
    """Whether a message is the user's, with a text."""
    return isinstance(message, dict) and message.get("role") == "user" and is_text(message.get("content"))


def message_of(message: object) -> dict:
    """The two entries of a chat message that we keep. Raises DataError."""
    if not isinstance(message, dict):
        raise DataError("a message of the prompt is no object with 'role' and 'content'")
    role = message.get("role")
    content = message.get("content")
    if not isinstance(role, str) or not isinstance(content, str):
        raise DataError("every message of the prompt needs 'role' and 'content' as text")
    return {"role": role, "content": content}


def name_of(row: dict, place: str, *keys: str) -> str:
    """The row's id under the first key that has one, else its place."""
    name = first_of(row, *keys)
    if is_text(name) or is_number(name):
        return str(name)
    return place


def theme_tags(theme: object) -> list[str]:
    """The tag of a theme, by which scores are also reported."""
    return [f"theme:{theme}"] if is_text(theme) else []


# ----------------------------------------------------------------------------- formats with signed items


def is_label(row: dict) -> bool:
    """HealthBench's meta-evaluation: a physician's labels of one answer."""
    return isinstance(row.get("binary_labels"), list) and is_text(row.get("completion"))


def refuse_label(row: dict, place: str) -> list[dict]:
    """Such a row has no rubric to train on."""
    raise DataError("a label of HealthBench's meta-evaluation, not a prompt with a rubric")


def is_healthbench(row: dict) -> bool:
    """Signed points per criterion."""
    return has_items(row.get("rubrics"), "criterion", "points") and not is_rubrichub(row)


def convert_healthbench(row: dict, place: str) -> list[dict]:
    """HealthBench (all, hard, consensus): axis and cluster in tags, an ideal completion for some prompts."""
    rubric = []
    for item in items_of(row["rubrics"]):
        axis = item.get("axis")
        rubric.append(own_criterion(item.get("criterion"), item.get("points"), axis=axis, tags=item.get("tags")))
    name = name_of(row, place, "prompt_id", "id")
    ideal = object_of(row.get("ideal_completions_data")).get("ideal_completion")
    return [own_row(name, row.get("prompt"), rubric, ideal, row.get("example_tags"), row.get("canary"))]


def is_professional(row: dict) -> bool:
    """A conversation with criterion texts and points."""
    return has_items(row.get("rubric_items"), "criterion_text", "points")


def convert_professional(row: dict, place: str) -> list[dict]:
    """HealthBench Professional, by the column names that its users' loaders read."""
    rubric = []
    for item in items_of(row["rubric_items"]):
        rubric.append(own_criterion(item.get("criterion_text"), item.get("points"), tags=item.get("tags")))
    prompt = row.get("prompt") or object_of(row.get("conversation")).get("messages")
    tags = theme_tags(row.get("use_case"))
    name = name_of(row, place, "prompt_id", "id")
    return [own_row(name, prompt, rubric, tags=tags, canary=row.get("canary"))]


def is_research_rubrics(row: dict) -> bool:
    """A signed weight per criterion, under either name of the column."""
    return has_items(first_of(row, "rubrics", "rubric_items"), "criterion", "weight")


def convert_research_rubrics(row: dict, place: str) -> list[dict]:
    """ResearchRubrics: weights from -5 to 5; its six axes are not ours and are copied as they are."""
    rubric = []
    for item in items_of(first_of(row, "rubrics", "rubric_items")):
        text = item.get("criterion")
        rubric.append(own_criterion(text, item.get("weight"), axis=item.get("axis"), tags=item.get("tags")))
    name = name_of(row, place, "sample_id", "id")
    tags = theme_tags(row.get("domain"))
    return [own_row(name, row.get("prompt"), rubric, tags=tags, canary=row.get("canary"))]


# ----------------------------------------------------------------------------- RubricHub and verl


def rubrichub_items(row: dict) -> list[dict]:
    """The criteria of a verl row, from the place that also says how each one is verified."""
    model = object_of(row.get("reward_model"))
    extra = object_of(row.get("extra_info"))
    nested = object_of(extra.get("reward_model"))
    places = [model.get("rubrics"), nested.get("rubrics"), extra.get("rubrics"), row.get("Rubrics")]
    for place in places:
        if has_items(place, "criterion"):
            return items_of(place)
    return []


def is_rubrichub(row: dict) -> bool:
    """Criteria inside the reward model, or under RubricHub's capital letter."""
    return bool(rubrichub_items(row))


def convert_rubrichub(row: dict, place: str) -> list[dict]:
    """RubricHub, and rows of verl in the same layout (RuscaRL): points are signed weights."""
    rubric = [rubrichub_criterion(item) for item in rubrichub_items(row)]
    name = name_of(row, place, "prompt_id", "id")
    reference = object_of(row.get("reward_model")).get("ground_truth")
    tags = row.get("example_tags") or theme_tags(row.get("ability"))
    prompt = first_of(row, "prompt", "messages")
    return [own_row(name, prompt, rubric, reference, tags, row.get("canary"))]


# The name of a checker: words, a colon, words.
CHECKER = re.compile(r"[a-z_]+:[a-z0-9_]+")


def rubrichub_criterion(item: dict) -> dict:
    """One criterion; a rule becomes a check. Raises DataError for a rule without a counterpart."""
    text = item.get("criterion")
    points = first_of(item, "points", "weight")
    tags = item.get("tags")
    # Here tags are no labels but an object that says who verifies: a model, or a function.
    verifier = tags if isinstance(tags, dict) and "verifier" in tags else {}
    if verifier.get("verifier") != "rule" and not CHECKER.fullmatch(str(text).strip()):
        labels = None if verifier else tags
        return own_criterion(text, points, axis=item.get("axis"), tags=labels)

    checker = str(text).strip()
    sentence, check = rule_check(checker, object_of(verifier.get("parameters")))
    return own_criterion(sentence, points, title=checker, check=check)


RELATIONS = {"at least": ">=", "at most": "<=", "less than": "<", "more than": ">"}


def rule_check(checker: str, parameters: dict) -> tuple[str, str]:
    """(statement, check) of one of IFEval's checkers. Raises DataError where no check means the same.

    >>> rule_check("length_constraints:number_words", {"num_words": 300, "relation": "at least"})
    ('Has at least 300 words.', 'words >= 300')
    """
    relation = parameters.get("relation")
    operator = RELATIONS.get(relation)
    counted = {
        "length_constraints:number_words": ("num_words", "words"),
        "length_constraints:number_sentences": ("num_sentences", "sentences"),
    }
    if checker in counted and operator:
        key, measure = counted[checker]
        number = parameters.get(key)
        if is_number(number):
            return f"Has {relation} {number} {measure}.", f"{measure} {operator} {number}"

    bullets = parameters.get("num_bullets")
    if checker == "detectable_format:number_bullet_lists" and is_number(bullets):
        return f"Has exactly {bullets} list items.", f"items == {bullets}"
    phrase = parameters.get("end_phrase")
    if checker == "startend:end_checker" and is_text(phrase):
        return f"Ends with the phrase {quoted(phrase)}.", f"ends_with {quoted(phrase)}"

    # Two keywords are all or nothing there; no single check says "both".
    keywords = parameters.get("keywords")
    if checker == "keywords:existence" and isinstance(keywords, list) and len(keywords) == 1:
        word = keywords[0]
        if is_text(word):
            return f"Contains {quoted(word)}.", f"contains {quoted(word)}"
    raise DataError(f"rule {checker!r} has no counterpart among the checks")


def quoted(text: str) -> str:
    """A text as checks write it: in double quotes."""
    return json.dumps(text, ensure_ascii=False)


# ----------------------------------------------------------------------------- RaR as released, DR Tulu

PREFIX = re.compile(r"\s*(?:(\w+) +criteri(?:a|on) *: *)?(.*)", re.I | re.S)


def released_criterion(item: dict) -> dict:
    """One criterion of RaR's data sets: its category stands before the text.

    >>> released_criterion({"description": "Pitfall Criteria: Recommends antibiotics.", "weight": -2})
    {'text': 'Recommends antibiotics.', 'category': 'Pitfall', 'weight': -2}
    >>> item = {"description": "Pitfall Criteria: The response should avoid rounding.", "weight": -1}
    >>> released_criterion(item)["weight"]
    1
    >>> released_criterion({"description": "Esssential Criteria: Names (A).", "weight": 5})["category"]
    'Essential'
    """
    text = item.get("description")
    weight = item.get("weight")
    if not is_text(text) or not is_number(weight):
        return own_criterion(text, weight, title=item.get("title"))

    word, text = PREFIX.match(text).groups("")
    category = released_category(word.lower(), weight)
    # All pitfalls have negative weights, whatever their wording; see 1. at the top of this file.
    if category == "pitfall":
        weight = abs(weight) if rar.names_avoidance(text) else -abs(weight)
    return own_criterion(text.strip(), weight, item.get("title"), category.capitalize(), item.get("axis"))


# "Does not mention X": an omission, so the fault is named, as the prompt that wrote the data asks.
OMITS = re.compile(
    r"(?:the \w+ )?(?:does not|doesn't) (?:explicitly |clearly |adequately |correctly |properly )?"
    r"(?:mention|state|include|identify|address|note|specify|list|provide|discuss|explain|consider|"
    r"acknowledge|emphasi[sz]e|recogni[sz]e|clarify|distinguish|differentiate|warn|advise|account|"
    r"describe|define|give|show|verify|check|ask|cite|justify|outline|highlight|connect|apply)\b",
    re.I,
)
DOES_NOT = re.compile(r"(?:the \w+ )?(?:does not|doesn't)\b", re.I)


def is_undecided(text: str) -> bool:
    """Whether a pitfall can be meant either way: "Does not suggest X" is good or bad as X is.

    >>> is_undecided("Does not suggest delaying fluids."), is_undecided("Does not mention fluids.")
    (True, False)
    """
    if rar.names_avoidance(text) or OMITS.match(text):
        return False
    return bool(DOES_NOT.match(text))


def released_category(word: str, weight: float) -> str:
    """The category; a prefix that is misspelt or missing is settled by the weight.

    The anchors are those of the prompt that wrote the data: 5, 3 to 4, 1 to 2, negative.
    """
    if weight < 0:
        return "pitfall"
    close = difflib.get_close_matches(word, rar.CATEGORY_WEIGHTS, 1, 0.7)
    if close:
        return close[0]
    if weight >= 5:
        return "essential"
    return "important" if weight >= 3 else "optional"


def is_released(row: dict) -> bool:
    """Descriptions with weights, and no criterion or text that says more."""
    items = items_of(row.get("rubric"))
    plain = not has_items(items, "text") and not has_items(items, "criterion")
    return plain and has_items(items, "description", "weight")


def convert_released(row: dict, place: str) -> list[dict]:
    """RaR-Medicine and RaR-Science."""
    rubric = [released_criterion(item) for item in items_of(row["rubric"])]
    prompt = first_of(row, "prompt", "question")
    reference = first_of(row, "reference_answer", "reference")
    name = name_of(row, place, "prompt_id", "id")
    tags = row.get("example_tags") or theme_tags(row.get("topic"))
    return [own_row(name, prompt, rubric, reference, tags, row.get("canary"))]


def is_open_instruct(row: dict) -> bool:
    """Rubrics inside the ground truth, which is JSON text."""
    return has_items(object_of(row.get("ground_truth")).get("rubrics"), "description")


def convert_open_instruct(row: dict, place: str) -> list[dict]:
    """DR Tulu's training data and others in open-instruct's layout; the sign of a weight is its polarity."""
    truth = object_of(row["ground_truth"])
    items = items_of(truth["rubrics"])
    # RaR's data also exist in this layout: their descriptions still begin with a category.
    released = any(PREFIX.match(str(item.get("description"))).group(1) for item in items)
    rubric = []
    for item in items:
        if released:
            rubric.append(released_criterion(item))
        else:
            rubric.append(own_criterion(item.get("description"), item.get("weight"), item.get("title")))

    prompt = row.get("messages") or truth.get("query")
    name = name_of(row, place, "id")
    return [own_row(name, prompt, rubric, tags=row.get("example_tags"), canary=row.get("canary"))]


# ----------------------------------------------------------------------------- formats without weights


def is_research_qa(row: dict) -> bool:
    """A query whose rubric items have no weight."""
    return has_items(row.get("rubric"), "rubric_item")


def convert_research_qa(row: dict, place: str) -> list[dict]:
    """ResearchQA: coverage counts all items alike; what an item asks for is kept as a tag."""
    rubric = []
    for item in items_of(row["rubric"]):
        tags = [f"type:{kind}" for kind in texts_of(item.get("type"))]
        rubric.append(own_criterion(item.get("rubric_item"), 1, tags=tags))
    name = name_of(row, place, "id")
    tags = theme_tags(first_of(row, "general_domain", "field"))
    return [own_row(name, row.get("query"), rubric, tags=tags)]


NUMBERED = re.compile(r"\s*\d+[.)]\s+(.*)")
RULE_KIND = re.compile(r"(.*?)\s*\[(hard rule|principle)\]\s*", re.I | re.S)


def is_open_rubrics(row: dict) -> bool:
    """A rubric that is one text."""
    return is_text(row.get("instruction")) and is_text(row.get("rubric"))


def convert_open_rubrics(row: dict, place: str) -> list[dict]:
    """OpenRubrics (v1 and v2): numbered lines, each with its kind in brackets at the end.

    The two responses that a judge compared are no reference answers and are left out.
    """
    texts = []
    for line in row["rubric"].split("\n"):
        numbered = NUMBERED.fullmatch(line)
        # A line without a number goes on with the criterion above it.
        if numbered:
            texts.append(numbered.group(1))
        elif texts and line.strip():
            texts[-1] += " " + line.strip()

    rubric = []
    for text in texts:
        kind = RULE_KIND.fullmatch(text)
        tags = [kind.group(2).lower().replace(" ", "_")] if kind else []
        rubric.append(own_criterion(kind.group(1) if kind else text, 1, tags=tags))
    return [own_row(name_of(row, place, "id"), row["instruction"], rubric)]


# ----------------------------------------------------------------------------- multiple choice

RUNS = 4  # times a question is asked, each with the options in another order (paper: v1 4, v2 10)
BOX = "Think it through, then end with the letter of the right option in \\boxed{}."
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
WRONG_OPTION = re.compile(r"Incorrect Answer( \d+)?")


def is_medqa(row: dict) -> bool:
    """The letter of the right option, and no rubric."""
    return is_text(row.get("answer_idx")) and not row.get("rubric")


def convert_medqa(row: dict, place: str) -> list[dict]:
    """MedQA and its kin: {"question", "options": {letter: text}, "answer_idx"}."""
    options = object_of(row.get("options"))
    right = options.get(row["answer_idx"])
    name = name_of(row, place, "id")
    return choice_rows(name, row.get("question"), list(options.values()), right, row.get("canary"))


def is_gpqa(row: dict) -> bool:
    """A right answer in a column of its own."""
    return is_text(row.get("Correct Answer"))


def convert_gpqa(row: dict, place: str) -> list[dict]:
    """GPQA, JSONL or its own CSV: the wrong options come first, as in `choice_rows`' fixed orders."""
    texts = [row[column] for column in row if WRONG_OPTION.fullmatch(column)]
    right = row["Correct Answer"]
    texts.append(right)
    name = name_of(row, place, "id", "Record ID")
    canary = first_of(row, "canary", "Canary String")
    return choice_rows(name, row.get("Question"), texts, right, canary)


def choice_rows(name: str, question: object, texts: list, right: object, canary: object) -> list[dict]:
    """RUNS rows of one question, the options in another order each time, by a seed that never changes.

    Each has one criterion, decided by a check. This is Remark 1 of the RaR paper: with k = 1, w = 1 and
    c = match, Eq. 1 is the verifiable reward.
    """
    if not all(is_text(text) for text in [question, right, *texts]):
        raise DataError("needs a question, at least two different options and the right one among them")
    # A wrong option that is listed twice is listed once: nothing is lost.
    different = list(dict.fromkeys(texts))
    if right not in different or not 2 <= len(different) <= len(LETTERS):
        raise DataError("needs a question, at least two different options and the right one among them")

    rows = []
    for run in range(1, RUNS + 1):
        key = f"{name}#{run}"
        order = random.Random(key).sample(different, len(different))
        letter = LETTERS[order.index(right)]
        listed = "\n".join(f"({mark}) {text}" for mark, text in zip(LETTERS, order))
        prompt = f"{question.strip()}\n\n{listed}\n\n{BOX}"

        answer = f"({letter}) {right}"
        check = f"boxed {quoted(letter)} {quoted(right)}"
        rubric = [own_criterion(f"The final answer is {answer}", 1, "Final answer", check=check)]
        rows.append(own_row(key, prompt, rubric, answer, [f"question:{name}"], canary))
    return rows


# ----------------------------------------------------------------------------- our own format


def is_own(row: dict) -> bool:
    """Criteria with a text, or whatever no other format claims but is a prompt."""
    return has_items(row.get("rubric"), "text")


def convert_own(row: dict, place: str) -> list[dict]:
    """Our own rows pass through, so that a folder may mix them with others."""
    rubric = []
    for item in items_of(row.get("rubric")):
        rubric.append(
            own_criterion(
                item.get("text"),
                first_of(item, "weight", "points"),
                item.get("title"),
                item.get("category"),
                item.get("axis"),
                item.get("tags"),
                item.get("check", ""),
            )
        )
    prompt = first_of(row, "prompt", "question")
    tags = row.get("example_tags") or theme_tags(row.get("topic"))
    name = name_of(row, place, "prompt_id", "id")
    return [own_row(name, prompt, rubric, row.get("reference"), tags, row.get("canary"))]


# ----------------------------------------------------------------------------- one row


class Format(NamedTuple):
    """How a format is recognised, and how one of its rows becomes rows of ours."""

    matches: Callable[[dict], bool]
    convert: Callable[[dict, str], list[dict]]


# The first that matches is used: a row with a rubric is no multiple-choice row.
FORMATS = {
    "HealthBench's labels": Format(is_label, refuse_label),
    "RubricHub": Format(is_rubrichub, convert_rubrichub),
    "DR Tulu": Format(is_open_instruct, convert_open_instruct),
    "HealthBench": Format(is_healthbench, convert_healthbench),
    "HealthBench Professional": Format(is_professional, convert_professional),
    "ResearchRubrics": Format(is_research_rubrics, convert_research_rubrics),
    "ResearchQA": Format(is_research_qa, convert_research_qa),
    "OpenRubrics": Format(is_open_rubrics, convert_open_rubrics),
    "our own": Format(is_own, convert_own),
    "RaR as released": Format(is_released, convert_released),
    "GPQA": Format(is_gpqa, convert_gpqa),
    "MedQA": Format(is_medqa, convert_medqa),
}


class Converted(NamedTuple):
    """Rows of our own, and the name of the format that they come from."""

    rows: list[dict]
    format: str


def convert_row(raw: object, place: Place) -> Converted:
    """A foreign row (an object, or a line of JSON) as checked rows of our own. Raises DataError."""
    try:
        row = without_nulls(parse_json(raw) if isinstance(raw, bytes) else raw)
        if not isinstance(row, dict):
            raise DataError(f"a {type(row).__name__}, not an object; each line must hold one JSON object")
        name = format_name(row)
        rows = FORMATS[name].convert(row, f"{place.name}:{place.number}")
        for own in rows:
            json.dumps(own, ensure_ascii=False).encode("utf8")
    except DataError as error:
        raise DataError(f"{place}: {error}") from None
    except UnicodeEncodeError:
        raise DataError(f"{place}: half of a surrogate pair in a text; it is not valid Unicode") from None
    # A number where a text should be, a text where a list should be, a thousand brackets.
    except (AttributeError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise DataError(f"{place}: a value of the wrong kind ({error})") from None

    # The reader that will read the file is its judge.
    for own in rows:
        rar.parse_example(own, str(place))
    return Converted(rows, name)


def format_name(row: dict) -> str:
    """The first format that the row's values match. Raises DataError."""
    for name, known in FORMATS.items():
        if known.matches(row):
            return name
    columns = ", ".join(sorted(str(column) for column in row)[:12])
    raise DataError(f"no rubric of a known format in its columns ({columns}); see data/prepare.py")


# ----------------------------------------------------------------------------- all rows

SHOWN = 10  # skipped rows that are named; of the others only the number is
CONTROLS = dict.fromkeys([*range(32), *range(127, 160)], "?")  # would reach the terminal as commands


@dataclass
class Report:
    """What became of the rows of a source."""

    read: int = 0
    written: int = 0
    repeats: int = 0
    skipped: int = 0
    undecided_pitfalls: int = 0
    in_several_files: int = 0
    formats: Counter = field(default_factory=Counter)
    reasons: Counter = field(default_factory=Counter)
    named: list[str] = field(default_factory=list)

    def skip(self, error: DataError) -> None:
        """Counts a row that cannot be used; the first few are named."""
        message = str(error).translate(CONTROLS)[:400]
        self.skipped += 1
        # The place differs from row to row, the reason does not.
        self.reasons[message.partition(": ")[2]] += 1
        if self.skipped <= SHOWN:
            self.named.append(message)

    def summary(self) -> dict:
        """The counts, for printing."""
        counts = {"read": self.read, "written": self.written, "repeats": self.repeats}
        counts |= {"skipped": self.skipped, "undecided_pitfalls": self.undecided_pitfalls}
        counts |= {"in_several_files": self.in_several_files, "formats": dict(self.formats)}
        return counts


def question_key(row: dict) -> int:
    """Equal for rows whose prompts differ in nothing but case, white space and the order of options."""
    texts = [row.get("question", "")]
    texts += [message["content"] for message in row.get("prompt", [])]
    talk = "\n".join(texts)
    # The options of a multiple-choice question begin here.
    if "\\boxed" in talk:
        talk = talk.partition("\n\n(A) ")[0]
    return hash(" ".join(talk.lower().split()))


def write_rows(source: str, file, report: Report, show_progress: bool) -> None:
    """Converts every row of the source and writes it to the open file, one at a time."""
    rows_read = set()
    place_of = {}
    file_of_question = {}
    in_several_files = set()

    bar = judge.progress_bar(None, "rows", "row", show_progress)
    with bar:
        for place, raw in read_source(source):
            bar.update()
            report.read += 1
            # The same row again says nothing new; one hash is kept for each, not the row.
            mark = hash(raw.strip() if isinstance(raw, bytes) else repr(raw))
            if mark in rows_read:
                report.repeats += 1
                continue
            rows_read.add(mark)

            try:
                converted = convert_row(raw, place)
                for own in converted.rows:
                    if own["id"] in place_of:
                        other = place_of[own["id"]]
                        raise DataError(f"{place}: id {own['id']!r} is also that of another row, {other}")
            except DataError as error:
                report.skip(error)
                continue

            # Whatever is written was checked whole: a row of several never stays behind in part.
            for own in converted.rows:
                place_of[own["id"]] = str(place)
                file.write(json.dumps(own, ensure_ascii=False).encode() + b"\n")
                report.written += 1
            report.formats[converted.format] += 1
            report.undecided_pitfalls += count_undecided(converted)

            question = question_key(converted.rows[0])
            if file_of_question.setdefault(question, place.file) != place.file:
                in_several_files.add(question)
    report.in_several_files = len(in_several_files)


def count_undecided(converted: Converted) -> int:
    """Pitfalls of RaR's released data that may be meant either way; they count as naming the fault."""
    if converted.format != "RaR as released":
        return 0
    count = 0
    for own in converted.rows:
        for item in own["rubric"]:
            is_pitfall = item["category"] == "Pitfall"
            count += is_pitfall and is_undecided(item["text"])
    return count


def checked_target(source: str, out: str, force: bool) -> Path:
    """The file to write. Raises DataError rather than touch a file that may be somebody else's."""
    target = Path(out)
    if target.suffix != ".jsonl":
        raise DataError(f"{out}: rows are written line by line as plain text; name a .jsonl file")
    if target.is_dir():
        raise DataError(f"{out}: a folder; name a .jsonl file")
    if target.exists() and Path(source).exists() and target.samefile(source):
        raise DataError(f"{out}: this is the source itself; name another file")
    if target.exists() and not force:
        raise DataError(f"{out}: exists already; name another file, or replace it with --force")
    return target


def prepare(
    source: str,
    out: str,
    max_bad: float = 0.02,
    force: bool = False,
    show_progress: bool = False,
) -> Report:
    """Writes the source's rows to `out` in our own format; nothing is written when too many cannot be used.

    max_bad: largest share of rows that may be skipped. Raises DataError.
    """
    if not 0 <= max_bad <= 1:
        raise DataError(f"--max_bad {max_bad}: give a share from 0 to 1")
    target = checked_target(source, out, force)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    report = Report()

    # Written beside the target and renamed at the end: a run that fails leaves nothing half done.
    try:
        with open(aside, "xb") as file:
            write_rows(source, file, report, show_progress)
        check_share(source, report, max_bad)
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)
    return report


def check_share(source: str, report: Report, max_bad: float) -> None:
    """Raises DataError when too few of the rows can be used."""
    if not report.read:
        raise DataError(f"{source}: no rows; give at least one JSON object per line")
    most_common = report.reasons.most_common(1)
    if report.skipped > max_bad * report.read:
        reason, count = most_common[0]
        share = f"{report.skipped} of {report.read} rows cannot be used"
        often = f"most often ({count}): {reason}"
        raise DataError(f"{source}: {share}, {often}; mend them, or allow more with --max_bad")
    if not report.written:
        raise DataError(f"{source}: no row can be used")


def print_report(report: Report) -> None:
    """What a person should know, on stderr."""
    for message in report.named:
        print(f"skipped {message}", file=sys.stderr)
    if report.skipped > SHOWN:
        print(f"skipped {report.skipped - SHOWN} more", file=sys.stderr)
    if report.undecided_pitfalls:
        doubt = "pitfalls may be meant either way; they are read as naming the fault"
        print(f"{report.undecided_pitfalls} {doubt}", file=sys.stderr)
    if report.in_several_files:
        leak = "questions are in more than one file or split; never train on held-out ones"
        print(f"{report.in_several_files} {leak}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Command line. Exit status 0, or 2 with one line that says what is wrong."""
    parser = argparse.ArgumentParser(
        description="Converts rows of published data sets into this project's own row format.",
        epilog="example: python data/prepare.py medqa.jsonl --out medqa_rows.jsonl",
    )
    parser.add_argument("source", help="a file, a folder, or a data set of the hub: owner/name[:config][:split]")
    parser.add_argument("--out", required=True, metavar="FILE", help="the .jsonl file to write")
    parser.add_argument("--max_bad", type=float, default=0.02, help="share of rows that may be skipped [0.02]")
    parser.add_argument("--force", action="store_true", help="replace FILE if it exists")
    args = parser.parse_args(argv)

    try:
        report = prepare(args.source, args.out, args.max_bad, args.force, show_progress=True)
    except (DataError, OSError) as error:
        print(f"prepare.py: {str(error).translate(CONTROLS)}", file=sys.stderr)
        return 2
    print_report(report)
    print(json.dumps({"out": args.out} | report.summary()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
