"""Lets a language model write rubrics, from its own knowledge or from what a search finds.

Without --search the model writes as the paper on Rubrics as Rewards asks it to (arXiv
2507.17746v2, pages 18 and 19): 7 to 20 items in four categories, guided by the reference answer
where there is one. With --search it writes as DR Tulu does (arXiv 2511.19399v3, appendix F.2): one
search with the question as it stands, one call, every item resting on a snippet. Either way an
answer is checked; where it fails, the model is told why and asked once more, and a question that
fails again is dropped and named.

Who writes is --domain: an examiner of whatever the question is about (general), a physician
(medicine), an examiner in science, or one of your own: one more entry of data/rubric_domains.json.

Each rubric is written to --out as soon as it arrives. The same command goes on where it stopped.

    python tools/write_rubrics.py QUESTIONS.jsonl --out FILE.jsonl \\
        --judge http://localhost:8000/v1 --judge_model NAME            # from its own knowledge
    python tools/write_rubrics.py QUESTIONS.jsonl --out FILE.jsonl \\
        --judge http://localhost:8000/v1 --judge_model NAME --search data/corpus.jsonl
    python train.py --data FILE.jsonl

QUESTIONS.jsonl holds {"question": ...} per line, and optionally "id" and "reference"; "prompt"
(chat messages) works as well. --search takes a JSONL file of {"id", "title", "text"}, a folder of
.txt and .md files, `web` (Serper's format, key in SERPER_API_KEY) or `scholar` (Semantic Scholar's,
key in S2_API_KEY). The judge's key is JUDGE_API_KEY.
"""

import argparse
import json
import os
import re
import sqlite3
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import requests
from urllib3.util import Retry

try:
    import fcntl  # not on every system
except ImportError:
    fcntl = None

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from judge import (
    STOP,
    JudgeError,
    LLMJudge,
    clean,
    fenced,
    fill,
    printable,
    progress_bar,
    read_prompt,
    render_conversation,
)
from rar import (
    AXES,
    DataError,
    Example,
    names_avoidance,
    parse_criterion,
    parse_example,
    read_rows,
)
from rler import criterion_id, one_line, read_entries
from tools.report import Parser, run_tool

BATCH = 64  # questions under way at a time, as many as the judge's client has workers
NAMED = 10  # dropped questions that are named on the terminal
SHOWN = 100  # characters of an answer that is no rubric, beside the reason

# ------------------------------------------------------------------------------------ the writer

# The prompt is data/rubric_writer.txt; who writes, and what the items look at, is an entry of
# data/rubric_domains.json: another domain is one more. Categories and most dimensions follow the
# paper; roles, axes, the pitfall's wording and all words are ours.

# Lowest and highest weight of a category, as the prompt asks for them.
WRITER_WEIGHT_RANGE = {
    "essential": (5, 5),
    "important": (3, 4),
    "optional": (1, 2),
    "pitfall": (-2, -1),
}
KEYS = ("title", "description", "category", "weight", "axis")
MIN_ITEMS = 7
MAX_ITEMS = 20
QUOTE = 12  # words in a row that an item may not share with the reference answer
# An item is judged alone: it must not refer to what the judge does not see.
POINTS_AWAY = re.compile(
    r"\breference (answer|response|solution)|"
    r"\bthe reference\b(?! (range|interval|value|frame))|"
    r"\bcriteri(on|a) \d|"
    r"\b(other|previous|next|same) (item|criteri)|"
    r"\b(mentioned|stated|described) (above|below)|"
    r"^(it|this|these|those|they)\b|"
    r"\bthe (correct|right) (answer|option|choice|diagnosis)[.,]?$",
    re.IGNORECASE,
)
# An omission, worded with "not": a pitfall names the mistake itself. (Other avoidance: rar.py.)
OMITS = re.compile(r"^(?:the response )?(?:does not|doesn't)\b", re.IGNORECASE)
# What a second prompt adds when the first answer was cut off at its token limit.
FEWER = {
    "writer": "An earlier answer was cut off at its limit: write exactly 7 items, each short.",
    "grounded": "An earlier answer was cut off at its limit: write at most 5 items, each short.",
}


def writer_prompt(example: Example, domain: str) -> str:
    """What the model is asked to write a rubric from its own knowledge.

    Without a reference its block and the ban on copying it are left out; the paper does not publish
    its own wording for that case.
    """
    # A single message needs no role in front of it.
    question = example.question
    if len(example.prompt) > 1:
        question = render_conversation(example.prompt)

    reference = ""
    no_copy = ""
    if example.reference:
        label = "A reference answer: good, not exhaustive, for guidance only"
        reference = f"{label}\n{fenced(example.reference)}\n\n"
        no_copy = " Do not copy sentences of the reference answer."

    # Who writes, and what the items look at. Whatever a user wrote is fenced.
    about = domains()[domain]
    return fill(
        read_prompt("rubric_writer.txt"),
        role=about["role"],
        look=about["look"],
        question=fenced(question),
        reference=reference,
        source=no_copy,
        axes=", ".join(AXES),
    )


def domains() -> dict[str, dict]:
    """name -> {"role", "look"}: the domains in which a rubric can be written. Raises DataError."""
    # People add their own.
    where = "data/rubric_domains.json"
    try:
        entries = json.loads(read_prompt("rubric_domains.json"))
    except ValueError as error:
        raise DataError(f"{where}: not JSON: {error}") from None
    if not isinstance(entries, dict):
        raise DataError(f'{where}: not an object of names, each with "role" and "look"')
    for name, about in entries.items():
        texts = [about.get("role"), about.get("look")] if isinstance(about, dict) else [None]
        if not all(isinstance(text, str) for text in texts):
            raise DataError(f'{where}: {name!r} needs "role" and "look", both text')
    return entries


def checked_rubric(example: Example, answer: dict) -> list[dict]:
    """A model's answer as items in our own format. Raises ValueError with what is wrong with it."""
    # The messages below go to the model as they are.
    items = answer.get("rubric")
    if not isinstance(items, list):
        items = []
    if not MIN_ITEMS <= len(items) <= MAX_ITEMS:
        raise ValueError(f'"rubric" must be a list of 7 to 20 items, not {len(items)}')

    quotes = word_runs(example.reference)
    rubric = []
    texts = set()
    for number, item in enumerate(items, 1):
        checked = checked_item(item, f"item {number}", quotes)
        # The same sentence twice would be paid twice.
        text = checked["text"].strip().lower()
        if text in texts:
            where = item_name(number, checked["text"])
            raise ValueError(f"{where}: stands there twice")
        texts.add(text)
        rubric.append(checked)

    # Without one, an answer that misses the point can have most of the points.
    if not any(item["category"].lower() == "essential" for item in rubric):
        raise ValueError("no Essential item")
    return rubric


def checked_item(item: object, where: str, quotes: set[tuple]) -> dict:
    """One item, with "text" for the paper's "description". Raises ValueError with what is wrong."""
    has_keys = isinstance(item, dict) and set(item) == set(KEYS)
    if not has_keys:
        raise ValueError(f"{where}: must have exactly the keys {', '.join(KEYS)}")
    # The weight is a number, all else is text.
    for key in KEYS:
        is_text = isinstance(item[key], str)
        if key != "weight" and not is_text:
            raise ValueError(f"{where}: must have exactly the keys {', '.join(KEYS)}")

    # The paper's model is asked for a description; our rows call it text.
    checked = {}
    for key in KEYS:
        name = "text" if key == "description" else key
        checked[name] = item[key]
    # A model can write "\\ud800" in its JSON; no file takes that.
    if not is_writable(checked):
        raise ValueError(f"{where}: holds a broken character (half of a surrogate pair)")

    # Text, number, category, and the sign that goes with it. A number of 400 digits is no weight.
    try:
        criterion = parse_criterion(checked, where)
    except OverflowError:
        raise ValueError(f"{where}: the weight is too large") from None

    # From here on the item is named by its words, too.
    where = f"{where} ({criterion.text[:80]})"
    if criterion.axis not in AXES:
        raise ValueError(f"{where}: axis {criterion.axis!r}; use one of {', '.join(AXES)}")
    low, high = WRITER_WEIGHT_RANGE.get(criterion.category.lower(), (0, 0))
    if not low <= criterion.weight <= high:
        weight = item["weight"]
        raise ValueError(f"{where}: weight {weight} does not go with {criterion.category}")
    # Lenient: two to four are asked for, one to six will do.
    if not 1 <= len(criterion.title.split()) <= 6:
        raise ValueError(f"{where}: the title must have two to four words")
    # The judge of an answer sees neither the reference nor the other items.
    if POINTS_AWAY.search(criterion.text):
        raise ValueError(f"{where}: cannot be checked alone; name what is meant")

    # Met means bad for a negative weight: "avoids X" would be punished for avoiding.
    names_no_mistake = names_avoidance(criterion.text) or OMITS.match(criterion.text)
    if criterion.weight < 0 and names_no_mistake:
        raise ValueError(f"{where}: a Pitfall must name the mistake itself")
    # A copied sentence pays for the reference's words, not for what it says.
    if word_runs(criterion.text) & quotes:
        raise ValueError(f"{where}: copies {QUOTE} words or more of the reference answer")
    return checked


def item_name(number: int, text: str) -> str:
    """An item as an error names it."""
    return f"item {number} ({text.strip()[:80]})"


def word_runs(text: str) -> set[tuple]:
    """Every run of QUOTE words."""
    # Case and punctuation do not make a copy less of a copy.
    words = re.findall(r"\w+", text.lower())
    runs = set()
    for start in range(len(words) - QUOTE + 1):
        runs.add(tuple(words[start : start + QUOTE]))
    return runs


# ------------------------------------------------------------------------------------ search


class Snippet(NamedTuple):
    """A passage that a search finds: an id to cite (a URL, a corpus id), its title, its text."""

    id: str
    title: str
    text: str


Search = Callable[[str], list[Snippet]]  # from a query to the snippets found, the best first
N_SNIPPETS = 10  # per question: the paper's number


def open_search(place: str) -> Search:
    """The search that --search names. Raises DataError."""
    # A local folder called "web" is still found as "./web".
    if place == "web":
        return web_search()
    if place == "scholar":
        return scholar_search()
    return local_search(place)


def local_search(path: str | Path, k: int = N_SNIPPETS) -> Search:
    """search(query) -> the k best local passages by BM25 (SQLite's FTS5). Raises DataError.

    path: a JSONL file of {"id", "title", "text"}, or a folder of .txt and .md files.
    """
    path = Path(path)
    # A folder that does not exist has no passages, either.
    passages = file_passages(path) if path.is_file() else folder_passages(path)
    if not passages:
        hint = "give a JSONL file, a folder with .txt or .md files, or web or scholar"
        raise DataError(f"{path}: no passages; {hint}")

    index = sqlite3.connect(":memory:")
    columns = "id UNINDEXED, title, text, tokenize = 'porter unicode61'"
    index.execute(f"CREATE VIRTUAL TABLE passages USING fts5({columns})")
    index.executemany("INSERT INTO passages VALUES (?, ?, ?)", passages)
    # A word of the title counts twice.
    ranked = (
        "SELECT * FROM passages WHERE passages MATCH ? "
        "ORDER BY bm25(passages, 0, 2, 1), rowid LIMIT ?"
    )

    def search(query: str) -> list[Snippet]:
        """Any word of the query may match."""
        words = set(re.findall(r"\w+", query.lower())) - STOP
        # Quoted, so that no word is read as an operator of FTS5's query language.
        quoted = [f'"{word}"' for word in sorted(words)]
        if not quoted:
            return []
        found = index.execute(ranked, (" OR ".join(quoted), k))
        return [Snippet(*row) for row in found]

    return search


def file_passages(path: Path) -> list[Snippet]:
    """The passages of a JSONL file. Raises DataError."""
    passages = []
    for where, row in read_rows(path):
        has_keys = isinstance(row, dict) and set(Snippet._fields) <= set(row)
        if not has_keys:
            raise DataError(f"{where}: no passage; each line needs id, title and text")
        # Cleaned: SQLite takes no broken characters.
        passages.append(Snippet(*(clean(str(row[key])) for key in Snippet._fields)))
    return passages


def folder_passages(path: Path) -> list[Snippet]:
    """The text files of a folder, cut at empty lines."""
    passages = []
    for file in sorted(path.rglob("*")):
        if file.suffix not in (".txt", ".md") or not file.is_file():
            continue
        # A file in another encoding still has its plain words.
        text = file.read_text(encoding="utf8", errors="replace")
        for number, part in enumerate(re.split(r"\n\s*\n", text), 1):
            if part.strip():
                name = f"{file.relative_to(path)}#{number}"
                passages.append(Snippet(clean(name), clean(file.stem), clean(part)))
    return passages


def web_search(k: int = N_SNIPPETS, url: str = "https://google.serper.dev/search") -> Search:
    """A web search in Serper's format. Raises DataError without SERPER_API_KEY."""
    key = secret("SERPER_API_KEY")
    if not key:
        raise DataError("--search web needs a key in the environment: SERPER_API_KEY")

    def snippet(row: dict) -> tuple:
        """(id, title, text) of one result."""
        return row.get("link"), row.get("title"), row.get("snippet")

    def search(query: str) -> list[Snippet]:
        """A service may return more than it is asked for."""
        return fetch("POST", url, key, "organic", snippet, json={"q": query, "num": k})[:k]

    return search


def scholar_search(
    k: int = N_SNIPPETS,
    url: str = "https://api.semanticscholar.org/graph/v1/snippet/search",
) -> Search:
    """A search for passages of papers in Semantic Scholar's format.

    A key in S2_API_KEY lifts the service's limits; none is needed. Raises DataError.
    """
    key = secret("S2_API_KEY")

    def snippet(row: dict) -> tuple:
        """(id, title, text) of one result; either of its objects may be null."""
        paper = row.get("paper")
        if not isinstance(paper, dict):
            paper = {}
        passage = row.get("snippet")
        if not isinstance(passage, dict):
            passage = {}
        # A paper may have no number.
        number = paper.get("corpusId")
        if not number:
            number = paper.get("title")
        return f"CorpusId:{number}", paper.get("title"), passage.get("text")

    def search(query: str) -> list[Snippet]:
        """A service may return more than it is asked for."""
        return fetch("GET", url, key, "data", snippet, params={"query": query, "limit": k})[:k]

    return search


def secret(name: str) -> str:
    """A key from the environment, "" if there is none. Raises DataError, which never shows it."""
    # A key read from a file ends in a newline, which no header can hold.
    key = os.environ.get(name, "").strip()
    if not key.isascii() or not key.isprintable():
        raise DataError(f"{name}: holds characters that no key has; set it again")
    return key


def fetch(
    method: str,
    url: str,
    key: str,
    list_name: str,
    snippet: Callable[[dict], tuple],
    **request,
) -> list[Snippet]:
    """Asks a search service once. Raises DataError, whose message never shows the key.

    list_name: where the results are in its reply. snippet: (id, title, text) of one result.
    request: what `requests` sends. Each passage is returned once, none without id and text.
    """
    # Five tries in all, at what another try can mend: busy, broken, no connection.
    busy = Retry(
        4,
        backoff_factor=0.5,
        status_forcelist=(408, 429, 500, 502, 503, 504),
        raise_on_status=False,
        allowed_methods=None,
    )
    # In a header of this request, and nowhere else.
    headers = {"X-API-KEY": key} if key else {}
    with requests.Session() as session:
        session.mount(url, requests.adapters.HTTPAdapter(max_retries=busy))
        try:
            # No redirects: the key is not for another host.
            reply = session.request(
                method, url, headers=headers, timeout=(10, 60), allow_redirects=False, **request
            )
        except requests.RequestException as error:
            kind = type(error).__name__
            raise DataError(f"the search at {url} cannot be reached ({kind})") from None

    # A proxy's page in HTML comes with status 200, too.
    answer = None
    if reply.status_code == 200:
        try:
            answer = reply.json()
        except (requests.JSONDecodeError, RecursionError):
            answer = None
    if not isinstance(answer, dict):
        # A service that refuses a key may repeat it. Taken out before the words are cut.
        text = reply.text.replace(key, "***") if key else reply.text
        words = " ".join(text.split())[:200]
        raise DataError(f"the search at {url} does not answer ({reply.status_code}): {words}")

    # Nothing found may come as no list at all.
    results = answer.get(list_name)
    if not isinstance(results, list):
        results = []
    # A dict as an ordered set: the best result first, each passage once.
    found = {}
    for row in results:
        if isinstance(row, dict):
            passage = Snippet(*map(one_line, snippet(row)))
            if passage.id and passage.text:
                found[passage] = True
    return list(found)


# ------------------------------------------------------------------------------------ grounding

# The paper's Answer Critical, Valuable and Context, in the categories of rar.py. The paper gives
# no weights for them.
TIERS = {"critical": ("Essential", 5), "valuable": ("Important", 3), "context": ("Optional", 1)}


def grounded_prompt(example: Example, snippets: list[Snippet]) -> str:
    """What the model is asked to write a rubric from snippets (data/rubric_grounding.txt)."""
    # Numbered, so that an item can say what it rests on.
    passages = []
    for number, snippet in enumerate(snippets, 1):
        passages.append(f"Snippet {number}, {clean(snippet.title)}:\n{fenced(snippet.text)}")
    return fill(
        read_prompt("rubric_grounding.txt"),
        question=fenced(example.question),
        snippets="\n\n".join(passages),
    )


def read_grounded(snippets: list[Snippet], answer: dict) -> list[dict]:
    """A model's answer as items in our own format, each with the snippet that it cites.

    Raises ValueError, for the model to read, when no usable item is there.

    >>> found = [Snippet("a7", "Rest", "Rest helps.")]
    >>> items = [{"text": "States that rest helps.", "snippet": 1}, {"text": "Ice.", "snippet": 2}]
    >>> [(item["text"], item["citation"]["id"]) for item in read_grounded(found, {"rubric": items})]
    [('States that rest helps.', 'a7')]
    """
    items = {}
    for entry in read_entries(answer, "rubric"):
        # What cites no snippet that exists is made up.
        number = entry.values.get("snippet")
        is_cited = type(number) is int and 1 <= number <= len(snippets)
        if not entry.text or not is_cited:
            continue

        # An unknown tier counts as the middle one.
        tier = str(entry.values.get("tier")).strip().lower()
        category, weight = TIERS.get(tier, TIERS["valuable"])
        item = {
            "title": entry.title,
            "text": entry.text,
            "category": category,
            "weight": weight,
            "citation": snippets[number - 1]._asdict(),
        }
        # The same sentence again is dropped: the first one stays.
        items.setdefault(criterion_id("", entry.text), item)
    if not items:
        n = len(snippets)
        raise ValueError(f'no item of "rubric" has a text and a "snippet" from 1 to {n}')
    return list(items.values())


# ------------------------------------------------------------------------------------ the output


class Output:
    """The file of rubrics: checked before anything in it is touched, then only appended to.

    Raises DataError where a line is not a row that was written here: the file is somebody else's.
    Only the beginning of such a row, left by a kill, is cut off.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.lock = threading.Lock()
        self.file = None
        self.ids = set()
        if self.path.suffix != ".jsonl":
            reason = "rows are written line by line as plain text"
            raise DataError(f"{path}: {reason}; name a .jsonl file")

        # Read as a whole: its last line decides whether it may be touched.
        data = b""
        if self.path.exists():
            data = self.path.read_bytes()
        self.size = len(data)
        lines = data.split(b"\n")
        for number, line in enumerate(lines[:-1], 1):
            if line.strip():
                self.ids.add(written_id(line, f"{self.path}:{number}"))

        # What stands behind the last newline: nothing, a row without its newline, or half a row.
        tail = lines[-1]
        self.n_cut = 0
        self.needs_newline = False
        if is_cut_row(tail):
            self.n_cut = len(tail)
        elif tail.strip():
            self.ids.add(written_id(tail, f"{self.path}:{len(lines)}"))
            self.needs_newline = True

    def start(self, file) -> None:
        """Takes over the file, opened for appending; cuts off half a row. Raises DataError."""
        # One writer per file: two would both pay for the same questions. Where the system has no
        # such lock, the size still shows somebody who wrote since the file was checked.
        is_ours = True
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                is_ours = False
        if not is_ours or file.seek(0, os.SEEK_END) != self.size:
            raise DataError(f"{self.path}: another process writes to it; wait for its end")

        file.truncate(self.size - self.n_cut)
        self.file = file

    def append(self, row: dict) -> None:
        """Writes one row. Raises OSError."""
        # In one call, so that a kill leaves at most the beginning of a row.
        line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
        with self.lock:
            if self.needs_newline:
                line = b"\n" + line
            end = self.file.seek(0, os.SEEK_END)
            n_written = self.file.write(line)
            # A full disk takes a part of it: without that part the file stays whole.
            if n_written < len(line):
                self.file.truncate(end)
                raise OSError(f"{self.path}: the disk is full")
            self.needs_newline = False


def written_id(line: bytes, where: str) -> str:
    """The id of a row that was written here. Raises DataError for anything else."""
    # Numbers of thousands of digits and lists a thousand deep are no rows, either.
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    # Without the rubric it is a question: --out names the questions' own file.
    is_ours = isinstance(row, dict) and "rubric" in row and isinstance(row.get("id"), str | int)
    if not is_ours:
        raise DataError(f"{where}: not a row that was written here; name another --out")
    return str(row["id"])


def is_cut_row(tail: bytes) -> bool:
    """Whether the end of a file is the beginning of a row as `append` writes it.

    >>> is_cut_row(b'{"id": "co'), is_cut_row(b'{"i'), is_cut_row(b"my notes"), is_cut_row(b"")
    (True, True, False, False)
    """
    # A row of ours begins like this. Half a row of anybody else's is not for us to cut.
    start = b'{"id": "'
    if not tail or not (tail.startswith(start) or start.startswith(tail)):
        return False
    try:
        json.loads(tail)
    except (ValueError, RecursionError):
        return True
    return False


def is_writable(value: object) -> bool:
    """Whether a value can be written as UTF-8: half of a surrogate pair ("\\ud800") cannot."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


# ------------------------------------------------------------------------------------ the loop


@dataclass
class Task:
    """What is asked and how answers are read; the same for all questions of a call of the tool."""

    prompt: Callable[[Example], tuple[str, object]]  # (prompt or "" to ask nothing, context)
    read: Callable[[Example, object, dict], list[dict]]  # (example, context, answer) -> rubric
    fewer: str  # what the prompt adds after an answer that was cut off


def writer_task(domain: str) -> Task:
    """Rubrics from the model's own knowledge."""

    def prompt(example: Example) -> tuple[str, None]:
        # The example itself is all the context that its answer needs.
        return writer_prompt(example, domain), None

    def read(example: Example, _: None, answer: dict) -> list[dict]:
        return checked_rubric(example, answer)

    return Task(prompt, read, FEWER["writer"])


def grounded_task(search: Search) -> Task:
    """Rubrics from what a search finds. DR Tulu's reason: its criteria name facts to be checked.

    Of the search-based criteria there 56 % do, of closed-book ones 22 % (Table 6).
    """

    def prompt(example: Example) -> tuple[str, list[Snippet]]:
        # One search at a time: the services allow a few calls per second.
        snippets = search(example.question)
        # Where nothing is found, there is nothing to ask.
        if not snippets:
            return "", []
        return grounded_prompt(example, snippets), snippets

    def read(example: Example, snippets: list[Snippet], answer: dict) -> list[dict]:
        # The numbers in the answer are those of this question's snippets.
        return read_grounded(snippets, answer)

    return Task(prompt, read, FEWER["grounded"])


@dataclass
class Report:
    """What became of the questions, filled in by many threads."""

    written: int = 0
    already_there: int = 0
    dropped: dict[str, str] = field(default_factory=dict)  # id -> reason
    refused: Counter = field(default_factory=Counter)  # why answers were not accepted
    lock: threading.Lock = field(default_factory=threading.Lock)

    def drop(self, name: str, reason: str) -> None:
        """Counts a question that gets no rubric."""
        with self.lock:
            self.dropped[name] = reason

    def count_written(self) -> None:
        """Counts a question that has its rubric."""
        with self.lock:
            self.written += 1

    def refuse(self, reason: str) -> None:
        """Counts an answer that is not accepted."""
        # The same reason for different items is one reason.
        reason = re.sub(r"^item \d+ \(.*\): ", "", reason, flags=re.DOTALL)
        with self.lock:
            self.refused[reason] += 1


def read_questions(source: str, report: Report) -> list[Example]:
    """The questions of a file; a row that cannot be used is dropped and named. Raises DataError."""
    questions = {}
    # A line that is no JSON ends this loop with an error: the file is not what the user thinks.
    for where, row in read_rows(source):
        try:
            example = parse_example(row, where, needs_rubric=False)
        except DataError as error:
            report.drop(where, str(error).removeprefix(f"{where}: "))
            continue

        # Found out now, and not after its rubric is paid for.
        if not is_writable(question_row(example)):
            report.drop(where, "holds a broken character (half of a surrogate pair)")
        elif example.id in questions:
            # Two rows of one id would make a file that no reader takes.
            report.drop(where, f"id {example.id!r} stands there twice; give each row its own")
        else:
            questions[example.id] = example

    if not questions:
        reason = next(iter(report.dropped.values()), "give at least one JSON object per line")
        raise DataError(f"{source}: no question that can be used: {reason}")
    return list(questions.values())


def question_row(example: Example) -> dict:
    """The row of a question, all but its rubric."""
    # The id first: by it, half a row is known as ours (is_cut_row).
    row = {
        "id": example.id,
        "prompt": example.prompt,
        "reference": example.reference,
        "example_tags": example.tags,
    }
    # The mark by which a benchmark asks to be left out of training corpora stays with its rows.
    if example.canary:
        row["canary"] = example.canary
    return row


@dataclass
class Request:
    """A question on its way: what the model is asked, and what became of it."""

    example: Example
    prompt: str
    context: object
    reason: str = ""  # why the last answer was not accepted
    was_whole: bool = False  # whether that answer held a whole object, accepted or not


def write_rubrics(
    judge: LLMJudge,
    task: Task,
    source: str,
    out: str,
    show_progress: bool = True,
) -> Report:
    """Writes a row to `out` for every question of `source` that is not in it yet.

    Raises DataError and JudgeError; `out` is not touched unless both files are as they should be.
    """
    # Everything that can be wrong is looked at before anything is written or paid for.
    report = Report()
    examples = read_questions(source, report)
    output = Output(out)

    todo = [example for example in examples if example.id not in output.ids]
    report.already_there = len(examples) - len(todo)
    if not todo:
        return report

    output.path.parent.mkdir(parents=True, exist_ok=True)
    # Unbuffered: a row is in the file as soon as `append` returns, whatever happens to us then.
    bar = progress_bar(len(todo), "rubrics", "question", show_progress)
    with bar, open(output.path, "ab", buffering=0) as file:
        output.start(file)
        # In batches: a search may be paid for, so it is made just before its answer is asked for,
        # and a kill wastes few.
        for start in range(0, len(todo), BATCH):
            batch = todo[start : start + BATCH]
            write_batch(judge, task, batch, output, report)
            bar.update(len(batch))
    return report


def write_batch(
    judge: LLMJudge,
    task: Task,
    examples: list[Example],
    output: Output,
    report: Report,
) -> None:
    """Asks for the rubrics of some questions, all at once. Raises JudgeError."""
    asked = []
    for example in examples:
        prompt, context = task.prompt(example)
        if prompt:
            asked.append(Request(example, prompt, context))
        else:
            # A model without snippets would write from its own knowledge.
            report.drop(example.id, "the search finds nothing")

    failed, stats = ask(judge, task, asked, output, report)
    # An answer that is cut off, also with four times the tokens, has too many items. Which of the
    # answers that were the client does not say, but none of them held a whole object.
    if stats.get("judge_missing_truncated"):
        again = []
        for request in failed:
            if request.was_whole:
                report.drop(request.example.id, request.reason)
            else:
                request.prompt = f"{request.prompt}\n\n{task.fewer}"
                request.reason = ""
                again.append(request)
        failed, stats = ask(judge, task, again, output, report)

    # What the client counted, for the answers that held no whole object.
    kinds = []
    for name, number in stats.items():
        if name.startswith("judge_missing_") and number:
            kinds.append(name.removeprefix("judge_missing_"))
    for request in failed:
        reason = request.reason
        if not request.was_whole:
            reason = f"no usable answer ({', '.join(kinds)})"
            # The client tells the model so; what the answer was it does not hand on.
            if not request.reason and kinds == ["unparsable"]:
                request.reason = "it holds no JSON object"
            if request.reason:
                reason = f"{reason}: {request.reason}"
        report.drop(request.example.id, reason)

    # After minutes without any answer the next questions would only wait as long again.
    if kinds == ["transport"] and not stats.get("judge_calls"):
        raise JudgeError("the judge does not answer; the same command goes on later")


def ask(
    judge: LLMJudge,
    task: Task,
    asked: list[Request],
    output: Output,
    report: Report,
) -> tuple[list[Request], dict]:
    """Asks the model, and writes each rubric as it arrives: (what failed, the judge's counts)."""

    def read(index: int, answer: dict) -> list[dict]:
        """Called by the client's threads, once for each answer; ValueError goes to the model."""
        request = asked[index]
        request.was_whole = "rubric" in answer
        try:
            rubric = task.read(request.example, request.context, answer)
        except ValueError as error:
            request.reason = str(error)
            # In an answer that is cut off the client finds single items: that is no refusal.
            if request.was_whole:
                report.refuse(request.reason)
            else:
                request.reason += f"; read was {json.dumps(answer)[:SHOWN]}"
            raise

        # In the file now, and not when all of the batch are there: a kill, or a judge that fails,
        # loses at most the calls under way.
        row = question_row(request.example)
        row["rubric"] = rubric
        output.append(row)
        report.count_written()
        return rubric

    # The client corrects and repeats by itself: here None is the end of it.
    prompts = [request.prompt for request in asked]
    rubrics = judge.write(prompts, read)
    failed = [request for request, rubric in zip(asked, rubrics) if rubric is None]
    return failed, judge.take_stats()


# ------------------------------------------------------------------------------------ command line


def not_empty(text: str) -> str:
    """A flag's value. An empty one is most often an unset variable of a shell."""
    if not text.strip():
        raise argparse.ArgumentTypeError("an empty value")
    return text


def known_domain(text: str) -> str:
    """A flag's value: the name of a domain."""
    if text not in domains():
        known = ", ".join(domains())
        own = "add one of your own to data/rubric_domains.json"
        raise argparse.ArgumentTypeError(f"{text!r} is none of {known}; {own}")
    return text


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    """The command's flags. Raises DataError."""
    parser = Parser(
        prog="write_rubrics.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("questions", metavar="QUESTIONS", type=not_empty, help="one JSON object per line")
    add("--out", metavar="FILE", type=not_empty, required=True, help="goes on where the file ends")
    add("--judge", metavar="URL", type=not_empty, help="an OpenAI-compatible server's base URL")
    add("--judge_model", metavar="NAME", type=not_empty, help="the model's name on that server")
    known = f"who writes: {', '.join(domains())}, or an entry of yours [general]"
    add("--domain", metavar="NAME", type=known_domain, help=known)
    add("--search", metavar="WHERE", type=not_empty, help="a file, a folder, web or scholar")

    flags = parser.parse_args(argv)
    # Not left to argparse, which would name the flags without saying what they are for.
    if flags.judge is None or flags.judge_model is None:
        raise DataError("a language model writes: give --judge URL and --judge_model NAME")
    # Grounded prompts have no role: who writes does not matter to what the snippets say.
    if flags.search is not None and flags.domain is not None:
        raise DataError("--domain goes without --search: grounded rubrics have no domain")
    return flags


def run(argv: list[str] | None) -> None:
    """Does what the flags say and prints one JSON line. Raises DataError, JudgeError, OSError."""
    flags = parse_flags(argv)
    if flags.search is None:
        task = writer_task("general" if flags.domain is None else flags.domain)
    else:
        task = grounded_task(open_search(flags.search))

    judge = LLMJudge(flags.judge, flags.judge_model, workers=BATCH)
    report = write_rubrics(judge, task, flags.questions, flags.out)
    # The first ones with their reasons: a thousand lines would hide them.
    dropped = list(report.dropped.items())
    for name, reason in dropped[:NAMED]:
        print(printable(f"dropped {name}: {reason}"), file=sys.stderr)
    if len(dropped) > NAMED:
        print(f"dropped: {len(dropped) - NAMED} more", file=sys.stderr)

    summary = {
        "out": flags.out,
        "written": report.written,
        "already_there": report.already_there,
        "dropped": list(report.dropped),
        "refused": dict(report.refused),
    }
    # Escaped, so that no id can write to the terminal.
    print(json.dumps(summary))
    # A script that goes on with the file must notice that there is none.
    if not report.written and not report.already_there:
        raise DataError(f"no question of {flags.questions} has a rubric now")


def main(argv: list[str] | None = None) -> int:
    """Exit status 0; 2 with one line that says what is wrong; 130 after Ctrl-C."""
    try:
        return run_tool("write_rubrics.py", run, argv, (DataError, JudgeError, OSError))
    except KeyboardInterrupt:
        # Nothing to save: every rubric that arrived is in the file.
        print("write_rubrics.py: stopped; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
