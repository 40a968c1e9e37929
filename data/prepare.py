"""Turns rows as other people publish them into rows that `rar.read_examples` reads.

    python data/prepare.py SOURCE --out FILE.jsonl [--max_bad 0.02] [--force]

SOURCE is a .jsonl, .jsonl.gz, .json (one list), .csv, .tsv or .parquet file, a folder of these, or
a data set of the Hugging Face hub: owner/name[:config][:split]. Parquet files and the hub need a
package (pip install datasets).

    python data/prepare.py healthbench.jsonl --out healthbench_rows.jsonl
    python data/prepare.py ScaleAI/RaR-Medicine:train --out rar_rows.jsonl
    python data/prepare.py Idavidrein/gpqa:gpqa_diamond:train --out gpqa_rows.jsonl

Formats, told apart by the values of a row; a column that is null or not named here changes nothing:

    ours, HealthBench   question or prompt, rubric or rubrics: text or criterion, weight or points
    ResearchRubrics     the same with axis; also as rubric_items, like HealthBench Professional
    RubricHub, verl     prompt or messages, reward_model.rubrics or Rubrics: criterion, points, tags
    DR Tulu             messages, ground_truth: JSON text with rubrics (open-instruct's layout)
    RaR as released     question, rubric: title, description, weight
    ResearchQA          query, rubric: rubric_item, type
    OpenRubrics         instruction, rubric: one numbered text
    multiple choice     MedQA: question, options by letter, answer_idx
                        ARC: question, choices (label and text: two lists), answerKey
                        MMLU: question, choices or options: a list, answer: place in it from 0,
                        letter or text of the right one
                        GPQA: Question, Correct Answer, Incorrect Answer 1, ...

What the formats leave open, and what is done here:

1. Polarity. All pitfalls of RaR's released data have negative weights, but nearly all of
   RaR-Science's forbid the fault ("Should avoid ...": good when met), and so does half of
   RaR-Medicine's. `rar.pitfall_polarity` decides by wording and title (97 % right on 71 items kept
   back, tests/evidence/README.md); a pitfall that is good when met gets a positive weight. How many
   it cannot decide is printed. In all other formats the published sign is the polarity.
2. Weights. ResearchQA and OpenRubrics publish none: every criterion weighs 1.
3. Axis and category stay empty where a format has none; ResearchRubrics' own axes are copied.
4. Rules. RubricHub names checkers of instruction following ("length_constraints:number_words"),
   with the parameters of IFEval. One that a check of judge.py can express becomes that check; a row
   with any other is skipped: many rows of that domain, so allow it with --max_bad. Rows of all
   other formats are treated alike.
5. Ids. A row without one is named after its place: path below SOURCE, a colon, the row's number.
"""

import argparse
import csv
import difflib
import json
import math
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import judge
import rar
from rar import DataError, Example, first_value, is_empty

# ----------------------------------------------------------------------------- where rows come from

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".csv", ".tsv", ".parquet")
HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?(?::([\w.-]+))?")
NEEDS_DATASETS = "parquet files and data sets of the hub need a package (pip install datasets)"


class Place(NamedTuple):
    """Where a row is from: its file (or split), the file's path below SOURCE, the row's number."""

    file: str
    inside: str
    number: int

    def __str__(self) -> str:
        return f"{self.file}:{self.number}"

    @property
    def name(self) -> str:
        """The id of a row that has none: the same wherever SOURCE lies."""
        return f"{self.inside}:{self.number}"


def read_source(source: str) -> Iterator[tuple[Place, object]]:
    """Yields (place, row), one at a time; a line of JSONL as bytes.

    Raises DataError when the source cannot be read at all.
    """
    path = Path(source)
    # In a fixed order, so that a repeat is always the later one.
    if path.is_dir():
        n_files = 0
        for file in sorted(path.rglob("*")):
            if file.is_file() and file.name.endswith(SUFFIXES):
                n_files += 1
                yield from read_file(file, file.relative_to(path).as_posix())
        if not n_files:
            raise DataError(f"{source}: no file in this folder ends with {', '.join(SUFFIXES)}")
        return

    # What is on disk comes first: a file is never taken for a data set of the hub.
    hub = HUB_NAME.fullmatch(source)
    if path.is_file():
        yield from read_file(path, path.name)
    elif hub and not source.endswith(SUFFIXES):
        yield from read_hub(*hub.groups())
    else:
        raise DataError(f"{source}: no such file or folder (on the hub, names are owner/name)")


def read_file(path: Path, inside: str) -> Iterator[tuple[Place, object]]:
    """The rows of one file; `inside` is its path below the source."""
    readers = {
        ".json": read_json_list,
        ".csv": read_csv,
        ".tsv": read_csv,
        ".parquet": read_parquet,
    }
    reader = readers.get(path.suffix, read_json_lines)
    try:
        for number, row in reader(path):
            yield Place(str(path), inside, number), row

    # What the csv module and the decoder raise for a file that is damaged or of another kind.
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); look after the file") from None


def read_json_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a JSONL file, plain or compressed, still as bytes."""
    # Decoded one by one, later: a line that is no JSON costs one row and not the file.
    for where, line in rar.read_lines(path):
        yield int(where.rpartition(":")[2]), line


def read_json_list(path: Path) -> Iterator[tuple[int, object]]:
    """The items of a .json file that holds one list."""
    for number, (_, row) in enumerate(rar.read_list(path), 1):
        yield number, row


def read_csv(path: Path) -> Iterator[tuple[int, dict]]:
    """The rows of a table as text, with commas or tabs, whose first line names the columns."""
    # Prompts outgrow the module's default of 128 kB per cell.
    csv.field_size_limit(2**31 - 1)
    # The csv module finds its own line ends inside quotes; spreadsheets write a byte-order mark.
    with open(path, newline="", encoding="utf-8-sig") as file:
        delimiter = "\t" if path.suffix == ".tsv" else ","
        yield from enumerate(csv.DictReader(file, delimiter=delimiter), 1)


def read_parquet(path: Path) -> Iterator[tuple[int, dict]]:
    """The rows of a parquet file."""
    table = load_dataset(str(path), "parquet", data_files=str(path), split="train")
    yield from enumerate(table, 1)


def read_hub(name: str, config: str | None, split: str | None) -> Iterator[tuple[Place, dict]]:
    """The rows of a data set of the hub, split by split."""
    shown = ":".join(word for word in (name, config, split) if word)
    # A single word after the name is a configuration only where the data set has one of that name.
    if config and not split and config not in config_names(shown, name):
        split = config
        config = None

    arguments = [name, config] if config else [name]
    splits = load_dataset(shown, *arguments)
    if split and split not in splits:
        raise DataError(f"{shown}: no split {split!r}; this data set has {', '.join(splits)}")

    # Ids keep the split but not the owner: a copy of the data set gives the same ids.
    wanted = [split] if split else list(splits)
    for split_name in wanted:
        label = ":".join([*arguments, split_name])
        for number, row in enumerate(splits[split_name], 1):
            yield Place(label, label.partition("/")[2], number), row


def load_dataset(shown: str, *arguments: str, **options: str):
    """`datasets.load_dataset`; whatever goes wrong there is one line."""
    # Optional, and slow to import: only those who need it pay for it.
    try:
        import datasets

        return datasets.load_dataset(*arguments, **options)
    except ImportError:
        raise DataError(f"{shown}: {NEEDS_DATASETS}") from None
    # The package raises its own errors, those of its HTTP client and Python's.
    except Exception as error:  # noqa: BLE001
        raise DataError(f"{shown}: cannot be loaded: " + str(error).partition("\n")[0]) from None


def config_names(shown: str, name: str) -> list[str]:
    """The configurations of a data set of the hub."""
    try:
        import datasets

        return datasets.get_dataset_config_names(name)
    except ImportError:
        raise DataError(f"{shown}: {NEEDS_DATASETS}") from None
    # As in `load_dataset`.
    except Exception as error:  # noqa: BLE001
        raise DataError(f"{shown}: cannot be loaded: " + str(error).partition("\n")[0]) from None


# ----------------------------------------------------------------------------- values


def without_nan(value: object) -> object:
    """The value with null for each nan, however deep: table libraries write nan for null.

    >>> without_nan([{"text": math.nan, "criterion": "Says hi."}])
    [{'text': None, 'criterion': 'Says hi.'}]
    """
    # In place, and with a list of what is still to be looked at instead of recursion: columns may
    # be nested deep.
    whole_value = [value]
    waiting = [whole_value]
    while waiting:
        holder = waiting.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        for key in keys:
            inner = holder[key]
            if isinstance(inner, float) and math.isnan(inner):
                holder[key] = None
            elif isinstance(inner, dict | list):
                waiting.append(inner)
    return whole_value[0]


def is_text(value: object) -> bool:
    """Whether the value is a text that says something."""
    return isinstance(value, str) and bool(value.strip())


def is_number(value: object) -> bool:
    """Whether the value is a number."""
    # Python counts true and false among its integers; here they are no numbers.
    return type(value) in (int, float)


def unpacked(value: object) -> object:
    """The value; decoded where it is a list or an object that a table keeps as JSON text.

    >>> unpacked('[{"points": 3}]'), unpacked("[sic] text")
    ([{'points': 3}], '[sic] text')
    """
    if not isinstance(value, str) or not value.lstrip().startswith(("{", "[")):
        return value
    # A text may begin with a bracket and be no JSON.
    try:
        return without_nan(json.loads(value))
    except (ValueError, RecursionError):
        return value


def object_of(value: object) -> dict:
    """The value as an object, decoded if need be; empty where it is none."""
    # Empty and not None, so that what is inside can be asked for at once.
    value = unpacked(value)
    return value if isinstance(value, dict) else {}


def list_of(value: object) -> list:
    """The value as a list, decoded if need be; empty where it is none."""
    value = unpacked(value)
    return value if isinstance(value, list) else []


def has_items(value: object, *keys: str) -> bool:
    """Whether an object in the list has a text under one of the keys."""
    # One is enough: if another item lacks it, that item is at fault and not the format another one.
    for item in list_of(value):
        if isinstance(item, dict) and is_text(first_value(item, *keys)):
            return True
    return False


def id_of(row: dict, place: Place, *keys: str) -> str:
    """The row's id under the first key that has one, else its place."""
    # A list or an object is no id, whatever the column is called.
    name = first_value(row, *keys)
    return str(name) if is_text(name) or is_number(name) else place.name


def tags_of(row: dict, *theme_keys: str) -> object:
    """The row's tags; where it has none, its theme, by which scores are reported as well."""
    theme = first_value(row, *theme_keys)
    # Tags of the data set's own may name a theme already.
    if row.get("example_tags") or not is_text(theme):
        return row.get("example_tags")
    return [f"theme:{theme}"]


def signed_item(item: object) -> object:
    """A criterion whose weight has the sign of its polarity, under our names."""
    # What is no object is left as it is: the reader of our format says what is wrong with it.
    if not isinstance(item, dict):
        return item
    return {
        "title": item.get("title"),
        "text": first_value(item, "text", "criterion", "criterion_text"),
        "category": item.get("category"),
        "weight": first_value(item, "weight", "points"),
        "axis": item.get("axis"),
        "tags": item.get("tags"),
        "check": item.get("check"),
    } | verifier_of(item)


def verifier_of(item: dict) -> dict:
    """Who verifies a criterion, and with which parameters; empty where nothing says so."""
    # RubricHub's tags are no labels but an object that says it. Rows of others in the same layout
    # have labels there, and they stay; some have these entries beside.
    tags = object_of(item.get("tags"))
    if "verifier" in tags:
        return {"verifier": tags["verifier"], "parameters": tags.get("parameters"), "tags": None}
    return {key: item[key] for key in ("verifier", "parameters") if key in item}


# ----------------------------------------------------------------------------- signed weights


def is_ours(row: dict) -> bool:
    """Criteria with texts in a list of the row: our own format, HealthBench, ResearchRubrics."""
    # HealthBench's meta-evaluation has no rubric; the reader of our format refuses it by name.
    is_label = isinstance(row.get("binary_labels"), list)
    return is_label or has_items(first_value(row, "rubrics", "rubric"), "text", "criterion")


def convert_ours(row: dict, place: Place) -> list[dict]:
    """What rar.py reads as it is; ResearchRubrics differs in the names of id and theme only.

    HealthBench's files are all alike: the whole benchmark, hard, consensus.
    """
    # Its answers are one level down, and most of its rows have none.
    ideal = object_of(row.get("ideal_completions_data"))
    reference = first_value(row, "reference", "reference_answer") or ideal.get("ideal_completion")

    # A description explains the text beside it. Alone it is no criterion of this format, and the
    # reader must not take it for one of RaR's.
    rubric = []
    for item in list_of(first_value(row, "rubrics", "rubric")):
        if isinstance(item, dict):
            item = item | {"description": None} | verifier_of(item)
        rubric.append(item)
    return [
        {
            "id": id_of(row, place, "prompt_id", "id", "sample_id"),
            "prompt": first_value(row, "prompt", "question"),
            "reference": reference,
            "example_tags": tags_of(row, "topic", "domain"),
            "canary": row.get("canary"),
            "rubric": rubric,
            "binary_labels": row.get("binary_labels"),
        }
    ]


def is_rubric_items(row: dict) -> bool:
    """The same under another column."""
    return has_items(row.get("rubric_items"), "criterion_text", "criterion")


def convert_rubric_items(row: dict, place: Place) -> list[dict]:
    """HealthBench Professional and ResearchRubrics, by the columns that their loaders name."""
    # Professional keeps its messages one level down.
    conversation = object_of(row.get("conversation"))
    prompt = first_value(row, "prompt", "question") or conversation.get("messages")
    return [
        {
            "id": id_of(row, place, "prompt_id", "id", "sample_id"),
            "prompt": prompt,
            "example_tags": tags_of(row, "use_case", "domain"),
            "canary": row.get("canary"),
            "rubric": [signed_item(item) for item in list_of(row["rubric_items"])],
        }
    ]


# ----------------------------------------------------------------------------- RubricHub and verl


def reward_model_items(row: dict) -> list:
    """The criteria of a row for verl."""
    model = object_of(row.get("reward_model"))
    extra = object_of(row.get("extra_info"))
    copied = object_of(extra.get("reward_model"))
    places = [model.get("rubrics"), copied.get("rubrics"), extra.get("rubrics")]
    # RubricHub's own column comes last: it lacks the tags that say how a criterion is verified.
    places.append(row.get("Rubrics"))
    for items in places:
        if has_items(items, "criterion"):
            return list_of(items)
    return []


def is_reward_model(row: dict) -> bool:
    """Criteria inside the reward model, or under RubricHub's capital letter."""
    return bool(reward_model_items(row))


def convert_reward_model(row: dict, place: Place) -> list[dict]:
    """RubricHub, and other rows for verl in the same layout (RuscaRL's)."""
    model = object_of(row.get("reward_model"))
    reference = model.get("ground_truth")
    return [
        {
            "id": id_of(row, place, "prompt_id", "id"),
            "prompt": first_value(row, "prompt", "messages"),
            # Anything but a text or a number is an argument of a checker, no answer.
            "reference": reference if is_text(reference) or is_number(reference) else None,
            "example_tags": tags_of(row, "ability", "topic"),
            "canary": row.get("canary"),
            "rubric": [signed_item(item) for item in reward_model_items(row)],
        }
    ]


def verified_item(item: object, place: Place) -> object:
    """A criterion under our names; a rule becomes a check. Raises DataError where none fits."""
    # One with a check of ours is decided by it.
    if not isinstance(item, dict) or not is_empty(item.get("check")):
        return item

    # A rule without its checker's name must not be judged as if it were a statement.
    text = str(first_value(item, "text", "criterion"))
    checker = rar.CHECKER.fullmatch(text)
    if not checker:
        if item.get("verifier") == "rule":
            raise DataError(f"{place}: rule {text[:60]!r} is not known")
        return item

    # The name of a function tells a reader nothing, so the text says what it asks for.
    name = checker.group(1)
    text, check = rule_check(name, object_of(item.get("parameters")))
    if not check:
        raise DataError(f"{place}: rule {name!r} has no counterpart among the checks of judge.py")
    return item | {"title": name, "text": text, "check": check}


OPERATORS = {"at least": ">=", "at most": "<=", "less than": "<", "more than": ">"}


def rule_check(checker: str, parameters: dict) -> tuple[str, str]:
    """(text, check) for one of IFEval's checkers; ("", "") where no check means the same.

    >>> rule_check("length_constraints:number_words", {"num_words": 300, "relation": "at least"})
    ('Has at least 300 words.', 'words >= 300')
    >>> rule_check("change_case:english_capital", {})
    ('', '')
    """
    # Lengths: IFEval knows "at least" and "less than".
    relation = parameters.get("relation")
    operator = OPERATORS.get(str(relation))
    for measure in ("words", "sentences"):
        number = whole(parameters.get(f"num_{measure}"))
        if checker == f"length_constraints:number_{measure}" and operator and is_number(number):
            return f"Has {relation} {number} {measure}.", f"{measure} {operator} {number}"

    # IFEval asks for that number of bullet points and no other.
    bullets = whole(parameters.get("num_bullets"))
    if checker == "detectable_format:number_bullet_lists" and is_number(bullets):
        return f"Has exactly {bullets} list items.", f"items == {bullets}"

    # Both ignore case.
    phrase = parameters.get("end_phrase")
    if checker == "startend:end_checker" and is_text(phrase):
        return f"Ends with {quoted(phrase)}.", f"ends_with {quoted(phrase)}"

    # Several keywords are all or nothing there, and one check asks for one text.
    keywords = list_of(parameters.get("keywords"))
    is_one = len(keywords) == 1 and is_text(keywords[0])
    if checker == "keywords:existence" and is_one:
        return f"Contains {quoted(keywords[0])}.", f"contains {quoted(keywords[0])}"
    return "", ""


def whole(number: object) -> object:
    """The value; 300 for 300.0, as a table stores whole numbers in a column that has gaps."""
    if isinstance(number, float) and number.is_integer():
        return int(number)
    return number


def quoted(text: str) -> str:
    """A text as checks write it: in double quotes."""
    return json.dumps(text, ensure_ascii=False)


# ----------------------------------------------------------------------------- descriptions

# "Pitfall Criteria: Recommends surgery."; a few rows of RaR-Science have the category alone.
PREFIX = re.compile(
    r"\s*(?:(\w+) +criteri(?:a|on) *: *|(essential|important|optional|pitfall) *: *)?(.*)",
    re.IGNORECASE | re.DOTALL,
)


def is_released(row: dict) -> bool:
    """Descriptions; rows whose criteria also have a text or a criterion are asked for before."""
    return has_items(row.get("rubric"), "description")


def convert_released(row: dict, place: Place) -> list[dict]:
    """RaR-Medicine and RaR-Science as released."""
    return [
        {
            "id": id_of(row, place, "prompt_id", "id"),
            "prompt": first_value(row, "prompt", "question"),
            "reference": first_value(row, "reference_answer", "reference"),
            "example_tags": tags_of(row, "topic"),
            "canary": row.get("canary"),
            "rubric": [released_item(item) for item in list_of(row["rubric"])],
        }
    ]


def released_item(item: object) -> object:
    """One criterion of RaR's data sets: its category stands before the text, its sign says little.

    >>> released_item({"description": "Pitfall Criteria: Recommends antibiotics.", "weight": -2})
    {'title': None, 'text': 'Recommends antibiotics.', 'category': 'Pitfall', 'weight': -2}
    >>> item = {"description": "Pitfall Criteria: Avoids rounding early.", "weight": -1}
    >>> released_item(item)["weight"]
    1
    >>> released_item({"description": "Esssential Criteria: Names (A).", "weight": 5})["category"]
    'Essential'
    """
    # As in `signed_item`: what is wrong here is said by the reader of our format.
    if not isinstance(item, dict):
        return item
    text = item.get("description")
    weight = item.get("weight")
    if not is_text(text) or not is_number(weight):
        return {"text": text, "weight": weight}

    word, text = split_prefix(text)
    title = item.get("title")
    category = released_category(word, weight)
    # The stored sign is the same for all; the wording decides, and the title (1. above).
    if category == "pitfall":
        is_good = rar.names_avoidance(text, title if is_text(title) else "")
        weight = abs(weight) if is_good else -abs(weight)
    released = {"title": title, "text": text, "category": category.capitalize(), "weight": weight}
    return released | verifier_of(item)


def split_prefix(description: str) -> tuple[str, str]:
    """(category in small letters, text) of a description; ("", text) where it names none.

    >>> split_prefix("Pitfall: Rounds early."), split_prefix("Rounds early.")
    (('pitfall', 'Rounds early.'), ('', 'Rounds early.'))
    """
    before_criteria, alone, text = PREFIX.match(description).groups("")
    word = before_criteria if before_criteria else alone
    return word.lower(), text


def released_category(word: str, weight: float) -> str:
    """The category; where its word is misspelt beyond recognition or missing, the weight says it.

    The anchors are those of the prompt that wrote the data: 5, 3 to 4, 1 to 2, negative.
    """
    # The sign before the word: a few pitfalls are called something else.
    if weight < 0:
        return "pitfall"
    # "Esssential", "Importnat", "Option".
    close = difflib.get_close_matches(word, rar.CATEGORY_WEIGHTS, 1, 0.7)
    if close:
        return close[0]
    if weight >= 5:
        return "essential"
    return "important" if weight >= 3 else "optional"


def ground_truth(row: dict) -> dict:
    """The ground truth, which is JSON text."""
    truth = row.get("ground_truth")
    # Newer rows of open-instruct wrap the text in a list.
    if isinstance(truth, list) and len(truth) == 1:
        truth = truth[0]
    return object_of(truth)


def is_ground_truth(row: dict) -> bool:
    """Rubrics inside the ground truth."""
    return has_items(ground_truth(row).get("rubrics"), "description")


def convert_ground_truth(row: dict, place: Place) -> list[dict]:
    """DR Tulu's training data and others in open-instruct's layout; here signs are polarities."""
    truth = ground_truth(row)
    items = list_of(truth["rubrics"])
    # RaR's data exist in this layout as well: their descriptions still begin with a category. The
    # word "Criteria" must follow it: anybody may begin a sentence with "Important:".
    is_rar = False
    for item in items:
        if PREFIX.match(str(item.get("description"))).group(1):
            is_rar = True

    rubric = []
    for item in items:
        if is_rar:
            rubric.append(released_item(item))
        # No category and no axis: this format has none, and none is guessed.
        else:
            text = item.get("description")
            weight = item.get("weight")
            signed = {"title": item.get("title"), "text": text, "weight": weight}
            rubric.append(signed | verifier_of(item))
    return [
        {
            "id": id_of(row, place, "id"),
            "prompt": row.get("messages") or truth.get("query"),
            "example_tags": row.get("example_tags"),
            "canary": row.get("canary"),
            "rubric": rubric,
        }
    ]


# ----------------------------------------------------------------------------- no weights


def is_research_qa(row: dict) -> bool:
    """A query with rubric items."""
    return has_items(row.get("rubric"), "rubric_item")


def convert_research_qa(row: dict, place: Place) -> list[dict]:
    """ResearchQA: its score counts all items alike; the kind of an item is kept as a tag."""
    rubric = []
    for item in list_of(row["rubric"]):
        # One kind or a list of several; not an axis of ours, so it is only a tag.
        kinds = rar.flat_tags(item.get("type"), str(place))
        tags = [f"type:{kind}" for kind in kinds]
        rubric.append({"text": item.get("rubric_item"), "weight": 1, "tags": tags})
    return [
        {
            "id": id_of(row, place, "id"),
            "prompt": row.get("query"),
            "example_tags": tags_of(row, "general_domain", "field"),
            "canary": row.get("canary"),
            "rubric": rubric,
        }
    ]


NUMBERED = re.compile(r"\s*\d+[.)]\s+(.*)")
KIND = re.compile(r"(.*?)\s*\[(hard rule|principle)\]\s*", re.IGNORECASE | re.DOTALL)


def is_open_rubrics(row: dict) -> bool:
    """A rubric that is one text."""
    return is_text(row.get("instruction")) and is_text(row.get("rubric"))


def convert_open_rubrics(row: dict, place: Place) -> list[dict]:
    """OpenRubrics (both versions): numbered lines, most with their kind in brackets at the end."""
    texts = []
    for line in row["rubric"].split("\n"):
        numbered = NUMBERED.fullmatch(line)
        if numbered:
            texts.append(numbered.group(1))
        # A line without a number belongs to the criterion above it; a heading has none above.
        elif texts and line.strip():
            texts[-1] += " " + line.strip()

    rubric = []
    for text in texts:
        # The kind says who can verify it, not what it weighs.
        kind = KIND.fullmatch(text)
        if kind:
            tags = [kind.group(2).lower().replace(" ", "_")]
            rubric.append({"text": kind.group(1), "weight": 1, "tags": tags})
        else:
            rubric.append({"text": text, "weight": 1})

    # The two responses that a judge compared are no reference answers.
    return [{"id": id_of(row, place, "id"), "prompt": row["instruction"], "rubric": rubric}]


# ----------------------------------------------------------------------------- multiple choice

RUNS = 4  # times a question is asked, each with the options in another order (paper: v1 4, v2 10)
BOX = "Think it through, then end with the letter of the right option in \\boxed{}."
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
WRONG_OPTION = re.compile(r"Incorrect Answer( \d+)?")


def is_medqa(row: dict) -> bool:
    """Options to choose from; rows that have a rubric as well are asked for before."""
    return first_value(row, "options", "choices", "answer_idx") is not None


def convert_medqa(row: dict, place: Place) -> list[dict]:
    """MedQA and its kin: a question, options by letter or in a list, and which one is right."""
    options = unpacked(first_value(row, "options", "choices"))
    answer = whole(first_value(row, "answer_idx", "answerKey", "answer"))
    # true is no place in a list.
    if not is_text(answer) and not is_number(answer):
        answer = None
    if isinstance(options, list):
        # A number is a place from 0, as in MMLU.
        labels = range(len(options)) if type(answer) is int else LETTERS
        right = dict(zip(labels, options)).get(answer, answer)
        # "B" may be the second of the list or the one that reads "B": nobody can tell.
        if answer in options and right != answer:
            right = None
        return choice_rows(row, place, row.get("question"), options, right)

    options = object_of(options)
    # ARC has the labels in a list and the texts in another.
    if isinstance(options.get("text"), list):
        options = dict(zip(list_of(options.get("label")), options["text"], strict=True))
    # Tables write null for the letters that other questions use.
    texts = [text for text in options.values() if text is not None]
    return choice_rows(row, place, row.get("question"), texts, options.get(answer))


def is_gpqa(row: dict) -> bool:
    """The right option in a column of its own."""
    return is_text(row.get("Correct Answer"))


def convert_gpqa(row: dict, place: Place) -> list[dict]:
    """GPQA, as JSONL or as its own CSV."""
    # Its CSV has the options before revision as well, in columns of other names.
    texts = [row[column] for column in row if WRONG_OPTION.fullmatch(column)]
    right = row["Correct Answer"]
    # The order, the right one last, is part of the seed: it fixes the shuffles.
    return choice_rows(row, place, row.get("Question"), [*texts, right], right)


def choice_rows(
    row: dict,
    place: Place,
    question: object,
    texts: list,
    right: object,
) -> list[dict]:
    """RUNS rows of one question, the options in another order each time.

    Each has one criterion, decided by a check. This is Remark 1 of the RaR paper: with k = 1, w = 1
    and c = match, Eq. 1 is the verifiable reward. Raises DataError.
    """
    all_text = all(is_text(text) for text in [question, right, *texts])
    if all_text:
        # GPQA's options end in line breaks here and there.
        right = right.strip()
        texts = [text.strip() for text in texts]
    # A wrong option that is listed twice is listed once: nothing is lost.
    options = list(dict.fromkeys(texts)) if all_text else []
    if not 2 <= len(options) <= len(LETTERS) or right not in options or texts.count(right) > 1:
        need = "needs a question, at least two different options and the right one among them"
        raise DataError(f"{place}: multiple choice {need}")

    name = id_of(row, place, "id", "Record ID")
    rows = []
    for run in range(1, RUNS + 1):
        # The seed is the id: every run and every policy sees the same orders.
        key = f"{name}#{run}"
        order = random.Random(key).sample(options, len(options))
        letter = LETTERS[order.index(right)]

        # As MedQA and GPQA are usually asked.
        listed = "\n".join(f"({mark}) {text}" for mark, text in zip(LETTERS, order))
        answer = f"({letter}) {right}"
        criterion = {
            "title": "Final answer",
            "text": f"The final answer is {answer}",
            "weight": 1,
            "check": f"boxed {quoted(letter)} {quoted(right)}",
        }
        rows.append(
            {
                "id": key,
                "prompt": f"{question.strip()}\n\n{listed}\n\n{BOX}",
                "reference": answer,
                # The runs of a question count as one question.
                "example_tags": [f"question:{name}"],
                "canary": first_value(row, "canary", "Canary String"),
                "rubric": [criterion],
            }
        )
    return rows


# ----------------------------------------------------------------------------- one row


class Format(NamedTuple):
    """How a row of a format is recognised, and what becomes of it."""

    matches: Callable[[dict], bool]
    convert: Callable[[dict, Place], list[dict]]


RELEASED = "RaR as released"
GROUND_TRUTH = "DR Tulu or open-instruct"  # RaR's data exist in this layout too
# The first that matches is used: texts of criteria come before descriptions, both before options.
FORMATS = {
    "RubricHub or verl": Format(is_reward_model, convert_reward_model),
    GROUND_TRUTH: Format(is_ground_truth, convert_ground_truth),
    "ours or HealthBench": Format(is_ours, convert_ours),
    "rubric_items": Format(is_rubric_items, convert_rubric_items),
    "ResearchQA": Format(is_research_qa, convert_research_qa),
    "OpenRubrics": Format(is_open_rubrics, convert_open_rubrics),
    RELEASED: Format(is_released, convert_released),
    "GPQA": Format(is_gpqa, convert_gpqa),
    "MedQA, ARC or MMLU": Format(is_medqa, convert_medqa),
}


class Converted(NamedTuple):
    """What one foreign row becomes: examples, and the lines that say the same in our format."""

    format: str
    examples: list[Example]
    lines: list[bytes]


def convert_row(raw: object, place: Place) -> Converted:
    """One foreign row (an object, or a line of JSON), converted and checked. Raises DataError."""
    where = str(place)
    row = rar.parse_json(raw, where) if isinstance(raw, bytes) else raw
    if not isinstance(row, dict):
        kind = type(row).__name__
        raise DataError(f"{where}: a {kind}, not an object; each line must hold one JSON object")
    row = {column: value for column, value in without_nan(row).items() if not is_empty(value)}

    # The reader of our format checks all that is written: the two can never disagree.
    try:
        name = format_name(row, place)
        examples = []
        for own in FORMATS[name].convert(row, place):
            # Whatever the format: the name of a checker is never judged as a statement.
            own["rubric"] = [verified_item(item, place) for item in own["rubric"]]
            examples.append(rar.parse_example(own, where))
        lines = [line_of(example) for example in examples]
    except DataError:
        raise
    # A number where a text should be, a text where a list should be, a weight of 400 digits.
    except (AttributeError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise DataError(f"{where}: a value of the wrong kind ({error})") from None
    return Converted(name, examples, lines)


def format_name(row: dict, place: Place) -> str:
    """The first format that the row's values match. Raises DataError."""
    for name, entry in FORMATS.items():
        if entry.matches(row):
            return name
    # DR Tulu's data have a few of these.
    if ground_truth(row).get("rubrics") == []:
        raise DataError(f"{place}: its rubric has no items")
    # The columns tell a person at once which data set it is.
    columns = ", ".join(sorted(map(str, row))[:12])[:200]
    writer = "questions without rubrics, as 'question' or 'prompt': python tools/write_rubrics.py"
    known = f"no rubric that data/prepare.py knows ({writer})"
    raise DataError(f"{place}: {known} in its columns: {columns}")


def line_of(example: Example) -> bytes:
    """The example as one line in our format; what says nothing is left out."""
    row = {"id": example.id}
    # A single question is easier to read as such than as a list of one message.
    if len(example.prompt) == 1:
        row["question"] = example.question
    else:
        row["prompt"] = example.prompt

    # The canary stays with whatever is written from its row.
    optional = {
        "reference": example.reference,
        "example_tags": example.tags,
        "canary": example.canary,
    }
    row |= {key: value for key, value in optional.items() if value}
    row["rubric"] = [row_of_criterion(criterion) for criterion in example.rubric]
    return json.dumps(row, ensure_ascii=False).encode("utf8") + b"\n"


def row_of_criterion(criterion: rar.Criterion) -> dict:
    """The criterion as an object in our format; what says nothing is left out."""
    # The fields of a criterion are the entries of our format, by name.
    entries = dict(vars(criterion))
    # People write 5 and not 5.0.
    if criterion.weight.is_integer():
        entries["weight"] = int(criterion.weight)
    return {key: value for key, value in entries.items() if value}


# ----------------------------------------------------------------------------- all rows

SHOWN = 10  # skipped rows that are named; the others are counted


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

    def skip(self, place: Place, error: DataError) -> None:
        """Counts a row that cannot be used."""
        message = one_line(error)
        self.skipped += 1
        # The place differs from row to row, the reason does not.
        self.reasons[message.removeprefix(f"{place}: ")] += 1
        if self.skipped <= SHOWN:
            self.named.append(message)


def one_line(error: Exception) -> str:
    """The message of an error, fit for a terminal."""
    return judge.printable(str(error))[:500]


def write_rows(source: str, file, report: Report, show_progress: bool) -> None:
    """Writes the rows of the source to the open file, each as soon as it is read."""
    file_of_row = {}
    place_of_id = {}
    file_of_question = {}
    leaks = set()

    with judge.progress_bar(None, "rows", "row", show_progress) as bar:
        for place, raw in read_source(source):
            bar.update()
            report.read += 1
            # The same row again says nothing new. A hash of each is kept, never the row.
            mark = hash(raw.strip() if isinstance(raw, bytes) else repr(raw))
            if mark in file_of_row:
                report.repeats += 1
                if file_of_row[mark] != place.file:
                    leaks.add(mark)
                continue
            file_of_row[mark] = place.file

            # A bad row is one row less, and no more.
            try:
                converted = convert_row(raw, place)
                refuse_known_ids(converted, place, place_of_id)
            except DataError as error:
                report.skip(place, error)
                continue

            # Only now: of a question that is asked several times, all runs are written or none.
            for example, line in zip(converted.examples, converted.lines):
                place_of_id[example.id] = str(place)
                file.write(line)
            report.written += len(converted.lines)
            report.formats[converted.format] += 1
            report.undecided_pitfalls += count_undecided(converted)

            # A question that is in two files is a leak where one of them is held out.
            question = rar.question_key(converted.examples[0])
            if file_of_question.setdefault(question, place.file) != place.file:
                leaks.add(question)
    report.in_several_files = len(leaks)


def refuse_known_ids(converted: Converted, place: Place, place_of_id: dict[str, str]) -> None:
    """Raises DataError for an id that a row with other content has."""
    # Whatever is kept per prompt (rubrics that evolve, answers compared) is kept by id.
    for example in converted.examples:
        if example.id in place_of_id:
            other = place_of_id[example.id]
            raise DataError(f"{place}: id {example.id!r} is also that of {other}, which differs")


def count_undecided(converted: Converted) -> int:
    """Pitfalls of RaR's released data that may be meant either way."""
    # Everywhere else the sign was published, whatever the wording.
    if converted.format not in (RELEASED, GROUND_TRUTH):
        return 0
    count = 0
    for example in converted.examples:
        for criterion in example.rubric:
            is_pitfall = criterion.category == "Pitfall"
            if is_pitfall and rar.pitfall_polarity(criterion.text, criterion.title) == 0:
                count += 1
    return count


def target_path(source: str, out: str, force: bool) -> Path:
    """The file to write. Raises DataError rather than touch one that may be somebody else's."""
    # "notes.md" is likely a slip, and .json or .gz would be read in another way.
    target = Path(out)
    if target.suffix != ".jsonl":
        raise DataError(f"{out}: rows are written line by line as plain text; name a .jsonl file")
    if target.is_dir():
        raise DataError(f"{out}: a folder; name a .jsonl file")

    # With --force as well: the only copy of the rows must not depend on a run that goes well.
    if target.exists() and Path(source).exists() and target.samefile(source):
        raise DataError(f"{out}: this is the source itself; name another file")
    # The next run would read it as one more file of rows.
    if Path(source).is_dir() and target.resolve().is_relative_to(Path(source).resolve()):
        raise DataError(f"{out}: inside the folder to read; name a file elsewhere")
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
    """Writes the rows of `source` to `out` in our own format.

    max_bad: largest share of rows that may be skipped, 0 to 1; above it nothing is written. Raises
    DataError.
    """
    # Written so that nan fails as well.
    if not 0 <= max_bad <= 1:
        raise DataError(f"--max_bad {max_bad}: give a share from 0 to 1")
    target = target_path(source, out, force)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{os.getpid()}")

    # Written beside the target and renamed at the end: a run that fails leaves nothing half done.
    report = Report()
    try:
        with open(aside, "wb") as file:
            write_rows(source, file, report, show_progress)
        check_share(source, report, max_bad)
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)
    return report


def check_share(source: str, report: Report, max_bad: float) -> None:
    """Raises DataError when too many of the rows cannot be used."""
    # An empty file is a mistake somewhere before.
    if not report.read:
        raise DataError(f"{source}: no rows; give at least one JSON object per line")

    # The most common reason says what to mend, or that the rows are of a kind to do without.
    if report.skipped > max_bad * report.read or not report.written:
        reason, count = report.reasons.most_common(1)[0]
        bad = f"{report.skipped} of {report.read} rows cannot be used"
        advice = "mend the rows, or allow more with --max_bad"
        # Not a row: hardly a matter of single rows.
        if not report.written:
            advice = "python data/prepare.py --help lists the formats"
        raise DataError(f"{source}: {bad}, {count} because: {reason}; {advice}")


def print_report(report: Report) -> None:
    """What a person should know about the rows, on stderr."""
    # A message per row would bury the rest.
    for message in report.named:
        print(f"skipped {message}", file=sys.stderr)
    if report.skipped > SHOWN:
        print(f"skipped {report.skipped - SHOWN} more", file=sys.stderr)

    # Not errors, but a person may want to look.
    if report.undecided_pitfalls:
        doubt = "pitfalls can be meant either way ('Does not mention X'); read as omissions"
        print(f"{report.undecided_pitfalls} {doubt}", file=sys.stderr)
    if report.in_several_files:
        leak = "questions are in more than one file or split; never train on held-out ones"
        print(f"{report.in_several_files} {leak}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Command line. Exit status 0, or 2 with one line that says what is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", help="a file, a folder, or a data set of the hub: owner/name[:config][:split]")
    add("--out", required=True, metavar="FILE", help="the .jsonl file to write")
    add("--max_bad", type=float, default=0.02, help="share of rows that may be skipped [0.02]")
    add("--force", action="store_true", help="replace FILE if it exists")
    args = parser.parse_args(argv)

    # What can go wrong is the source, a flag or the disk; all else is a fault of this program.
    try:
        report = prepare(args.source, args.out, args.max_bad, args.force, show_progress=True)
    except (DataError, OSError) as error:
        print(f"prepare.py: {one_line(error)}", file=sys.stderr)
        return 2

    print_report(report)
    # One line of JSON on stdout, for programs.
    counts = {"out": args.out, "read": report.read, "written": report.written}
    counts |= {"repeats": report.repeats, "skipped": report.skipped}
    counts |= {"formats": dict(report.formats)}
    print(json.dumps(counts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
