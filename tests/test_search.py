"""The searches, against a local server that speaks the services' formats; grounded rubrics."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlparse

import pytest
import torch
from conftest import ROOT
from judge_server import JudgeServer

import rar
import rler
import train
from judge import LexicalJudge, LLMJudge
from rar import DataError
from tools import write_rubrics as tool
from tools.write_rubrics import Snippet

CORPUS = ROOT / "data" / "corpus.jsonl"


class Service:
    """`with Service(replies) as service:` answers with (status, body), one each, the last for ever."""

    def __init__(self, *replies):
        self.replies = list(replies)
        self.requests = []

    def __enter__(self):
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                outer.answer(self)

            def do_GET(self):
                outer.answer(self)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/search"
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def answer(self, handler):
        body = None
        if handler.command == "POST":
            body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        headers = {key.lower(): value for key, value in handler.headers.items()}
        self.requests.append({"path": handler.path, "headers": headers, "body": body})

        status, reply = self.replies[0]
        if len(self.replies) > 1:
            self.replies.pop(0)
        content = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)


SERPER = {
    "searchParameters": {"q": "x"},
    "organic": [
        {"title": "Colds", "link": "https://a.example/1", "snippet": "Rest helps\na cold."},
        {"title": "No text", "link": "https://a.example/2"},
        {"title": "Colds", "link": "https://a.example/1", "snippet": "Rest helps\na cold."},
        {"title": "Water", "link": "https://a.example/3", "snippet": "Drink water."},
    ],
}
SCHOLAR = {
    "data": [
        {
            "score": 0.9,
            "paper": {"corpusId": "12", "title": "On colds"},
            "snippet": {"text": "We find that rest helps.", "snippetKind": "body"},
        },
        {"score": 0.8, "paper": {"title": "Untitled id"}, "snippet": {"text": "Water helps."}},
        {"score": 0.7, "paper": None, "snippet": None},
    ],
    "retrievalVersion": "1",
}


def test_a_web_search(monkeypatch):
    monkeypatch.setenv("SERPER_API_KEY", "secret-key")
    with Service((200, SERPER)) as service:
        found = tool.web_search(k=2, url=service.url)("what helps?")
        [asked] = service.requests
    assert found == [
        Snippet("https://a.example/1", "Colds", "Rest helps a cold."),
        Snippet("https://a.example/3", "Water", "Drink water."),
    ]
    assert asked["body"] == {"q": "what helps?", "num": 2}
    assert asked["headers"]["x-api-key"] == "secret-key"


@pytest.mark.parametrize("key", [None, "", " \n"])
def test_a_web_search_needs_a_key(monkeypatch, key):
    monkeypatch.delenv("SERPER_API_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("SERPER_API_KEY", key)
    with pytest.raises(DataError, match="SERPER_API_KEY"):
        tool.web_search()


@pytest.mark.parametrize("key", ["", "s2-secret"])
def test_a_scholarly_search(monkeypatch, key):
    monkeypatch.setenv("S2_API_KEY", key)
    with Service((200, SCHOLAR)) as service:
        found = tool.scholar_search(k=5, url=service.url)("rest & water?")
        [asked] = service.requests
    assert found == [
        Snippet("CorpusId:12", "On colds", "We find that rest helps."),
        Snippet("CorpusId:Untitled id", "Untitled id", "Water helps."),
    ]
    query = parse_qs(urlparse(asked["path"]).query)
    assert query == {"query": ["rest & water?"], "limit": ["5"]}
    assert asked["headers"].get("x-api-key", "") == key


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_service_is_asked_again(monkeypatch, status):
    monkeypatch.setenv("SERPER_API_KEY", "k")
    with Service((status, {"message": "later"}), (200, SERPER)) as service:
        assert len(tool.web_search(url=service.url)("x")) == 2
        assert len(service.requests) == 2


@pytest.mark.parametrize(
    "status, reply",
    [
        (403, {"message": "Unauthorized key secret-key."}),
        (400, {"error": "bad"}),
        (200, b"<html>"),
        (200, []),
        (200, b"[" * 100_000),
        (302, b""),
        (200, b"\xff\xfe"),
    ],
)
def test_what_no_retry_mends_is_one_line_without_the_key(monkeypatch, status, reply):
    # With the newline of a file that it was read from.
    monkeypatch.setenv("SERPER_API_KEY", "secret-key\n")
    with Service((status, reply)) as service:
        with pytest.raises(DataError) as caught:
            tool.web_search(url=service.url)("x")
        assert len(service.requests) == 1
        assert service.requests[0]["headers"]["x-api-key"] == "secret-key"
    error = str(caught.value)
    assert "secret-key" not in error
    assert "\n" not in error
    assert service.url in error


@pytest.mark.parametrize("key", ["secret\nkey", "secret-k\u00e9y", "secret\x00key", "secret\ud800"])
def test_a_key_that_no_header_can_hold_is_not_printed(monkeypatch, key):
    monkeypatch.setattr(tool.os, "environ", {"SERPER_API_KEY": key, "S2_API_KEY": key})
    for search in (tool.web_search, tool.scholar_search):
        with pytest.raises(DataError, match="_API_KEY: holds characters that no key has") as caught:
            search()
        assert "secret" not in str(caught.value)


def test_a_service_that_is_not_there(monkeypatch):
    monkeypatch.setenv("SERPER_API_KEY", "secret-key")
    with Service((200, SERPER)) as service:
        pass
    # The waiting between tries is tested above.
    monkeypatch.setattr(tool, "Retry", lambda *_, **__: 0)
    with pytest.raises(DataError, match="cannot be reached"):
        tool.web_search(url=service.url)("x")


@pytest.mark.parametrize(
    "reply",
    [
        {},
        {"organic": None},
        {"organic": []},
        {"organic": {"a": "b"}},
        {"organic": ["text", {"snippet": 3, "link": "l"}]},
    ],
)
def test_nothing_found_is_an_empty_list(monkeypatch, reply):
    monkeypatch.setenv("SERPER_API_KEY", "k")
    with Service((200, reply)) as service:
        assert tool.web_search(url=service.url)("x") == []


def test_no_more_than_k_are_taken(monkeypatch):
    """Some services give more than they are asked for."""
    monkeypatch.setenv("SERPER_API_KEY", "k")
    web = []
    papers = []
    for n in range(4):
        web.append({"link": f"l{n}", "title": "t", "snippet": f"s{n}"})
        papers.append({"paper": {"corpusId": n + 1}, "snippet": {"text": f"s{n}"}})
    for search, reply in (
        (tool.web_search, {"organic": web}),
        (tool.scholar_search, {"data": papers}),
    ):
        with Service((200, reply)) as service:
            found = search(k=2, url=service.url)("x")
        assert [snippet.text for snippet in found] == ["s0", "s1"]


# ---------------------------------------------------------------------------- local documents


def test_bm25_over_the_corpus_finds_the_passage():
    passages = []
    for line in CORPUS.read_text(encoding="utf8").split("\n"):
        if line:
            passages.append(json.loads(line))
    assert len(passages) >= 150
    assert len({passage["id"] for passage in passages}) == len(passages)

    # A passage is found by its own title and first words.
    search = tool.local_search(CORPUS, 3)
    first = 0
    for passage in passages:
        words = " ".join(passage["text"].split()[:8])
        found = search(f"{passage['title']} {words}")
        first += found[0].id == passage["id"]
    assert first >= 0.95 * len(passages)


def test_rare_words_weigh_more_and_titles_more_than_text(tmp_path):
    path = tmp_path / "docs.jsonl"
    rows = [
        {"id": "1", "title": "Water", "text": "The scurvy of sailors."},
        {"id": "2", "title": "Scurvy", "text": "A lack of fruit."},
        {"id": "3", "title": "Water", "text": "Water is wet, water is blue."},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    search = tool.local_search(path)
    # Two rare words.
    assert search("Which water helps sailors with scurvy?")[0].id == "1"
    # Stemmed, and the title counts twice.
    assert search("scurvies")[0].id == "2"


@pytest.mark.parametrize(
    "query",
    [
        'water" OR title:x',
        "NEAR(a b)",
        "a* AND ^b",
        "",
        "the of is",
        "({[",
        "\x00",
        "水 на",
        "' ; DROP TABLE passages",
    ],
)
def test_no_question_is_read_as_query_language(query):
    assert isinstance(tool.local_search(CORPUS)(query), list)


def test_a_folder_of_text_files(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "colds.md").write_text("# Colds\n\nRest helps.\n\n\nWater helps too.\n")
    (tmp_path / "odd.txt").write_bytes(b"caf\xe9 scurvy")
    (tmp_path / "picture.png").write_bytes(b"rest")
    (tmp_path / "folder.txt").mkdir()
    search = tool.local_search(tmp_path)
    assert search("rest") == [Snippet("sub/colds.md#2", "colds", "Rest helps.")]
    assert search("scurvy")[0].id == "odd.txt#1"


@pytest.mark.parametrize("content", ["not json\n", '{"id": 1}\n', "[1, 2]\n", ""])
def test_documents_that_are_none_are_one_line(tmp_path, content):
    path = tmp_path / "docs.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match="docs.jsonl"):
        tool.local_search(path)


def test_a_broken_character_in_a_document_is_replaced(tmp_path):
    path = tmp_path / "docs.jsonl"
    path.write_text(json.dumps({"id": "a", "title": "T", "text": "scurvy \ud800"}) + "\n")
    [found] = tool.local_search(path)("scurvy")
    assert found.text == "scurvy ?"


# ---------------------------------------------------------------------------- grounded rubrics

COMMON_COLD = "What helps against a common cold?"
BLUE_SKY = "Why is the sky blue?"


class Writer(JudgeServer):
    """Cites snippet 1 twice and snippet 99, which does not exist; about lead it refuses."""

    def verdict(self, body):
        # The last message may be the request to answer once more.
        prompt = body["messages"][0]["content"]
        if "lead poisoning" in prompt.partition("Snippet 1,")[0]:
            return "I would rather not."
        fact = re.search(r"\nSnippet 1, .*:\n`+\n(.*)", prompt)[1].split(".")[0]
        items = []
        for tier, text, number in (
            ("critical", f"States that {fact}.", 1),
            ("valuable", "States that it is so.", 1),
            ("critical", "States a falsehood.", 99),
            ("context", f"states that {fact}", 1),
            ("odd", "Says when.", 2),
            ("valuable", "", 1),
        ):
            items.append({"tier": tier, "title": "T", "text": text, "snippet": number})
        return json.dumps({"rubric": items})


def write_questions(path, questions):
    rows = [{"id": f"q{n}", "question": question} for n, question in enumerate(questions)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.long
def test_grounded_rubrics_are_written_cited_and_trained_on(tmp_path, capsys, tiny):
    questions = [COMMON_COLD, BLUE_SKY, "How is lead poisoning treated?", "qqqqqq zzzzzz?"]
    source = write_questions(tmp_path / "q.jsonl", questions)
    out = tmp_path / "grounded.jsonl"
    with Writer() as server:
        flags = ["--judge", server.url, "--judge_model", "m", "--search", str(CORPUS)]
        assert tool.main([str(source), "--out", str(out), *flags]) == 0
        prompts = [body["messages"][0]["content"] for body in server.bodies]
    report = json.loads(capsys.readouterr().out)
    assert report["written"] == 2
    assert sorted(report["dropped"]) == ["q2", "q3"]
    # Nothing found, nothing asked.
    assert all("Snippet 1, " in prompt for prompt in prompts)
    assert not any("qqqqqq" in prompt for prompt in prompts)

    rows = [json.loads(line) for line in out.read_text().split("\n") if line]
    corpus = {json.loads(line)["id"] for line in CORPUS.read_text().split("\n") if line}
    for row in rows:
        weights = [(item["category"], item["weight"]) for item in row["rubric"]]
        assert weights == [("Essential", 5), ("Important", 3), ("Important", 3)]
        for item in row["rubric"]:
            # What cites nothing is dropped.
            assert "falsehood" not in item["text"]
            assert item["citation"]["id"] in corpus
            assert item["citation"]["text"]

    example = rar.read_examples(out)[0]
    persistent = rler.initial_buffer(example).persistent
    assert [c.text for c in persistent] == [item["text"] for item in rows[0]["rubric"]]
    assert persistent[0].weight > persistent[1].weight

    run = tmp_path / "run"
    heldout = ROOT / "data" / "heldout.jsonl"
    flags = ["--method", "rler", "--model", str(tiny), "--data", str(out)]
    flags += ["--eval_data", str(heldout), "--steps", "1", "--prompts_per_step", "1"]
    flags += ["--group_size", "2", "--max_new_tokens", "4", "--out", str(run)]
    assert train.main(flags) == 0
    state = torch.load(run / "checkpoint" / "trainer.pt", weights_only=True)["method"]
    [(name, buffer)] = state["buffers"].items()
    [row] = [row for row in rows if row["id"] == name]
    persistent = [criterion["text"] for criterion in buffer["persistent"]]
    assert persistent == [item["text"] for item in row["rubric"]]


def test_what_cites_nothing_is_told_to_the_model():
    snippets = [Snippet("a", "T", "Rest helps.")]
    for answer in (
        {},
        {"rubric": []},
        {"rubric": [{"text": "Rest.", "snippet": True}]},
        {"rubric": [{"text": "Rest.", "snippet": 0}]},
        {"rubric": [{"text": "Rest.", "snippet": "1"}]},
        {"rubric": [{"text": 3, "snippet": 1}, None, "text"]},
    ):
        with pytest.raises(ValueError, match="rubric"):
            tool.read_grounded(snippets, answer)


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], "give --judge URL"),
        (["--judge", "http://127.0.0.1:9/v1", "--judge_model", "m"], "no passages"),
        (
            ["--judge", "http://127.0.0.1:9/v1", "--judge_model", "m", "--domain", "science"],
            "--domain goes without --search",
        ),
    ],
)
def test_what_cannot_work_is_one_line(tmp_path, capsys, flags, words):
    source = write_questions(tmp_path / "q.jsonl", ["Why?"])
    out = tmp_path / "out.jsonl"
    flags = [str(source), "--out", str(out), "--search", "no-such-folder", *flags]
    assert tool.main(flags) == 2
    error = capsys.readouterr().err.strip()
    assert words in error
    assert "\n" not in error
    assert not out.exists()


def test_grounding_goes_on_where_it_was_stopped(tmp_path):
    """A row that is there is neither asked for nor searched for again: both may be paid for."""
    source = write_questions(tmp_path / "q.jsonl", [COMMON_COLD, BLUE_SKY])
    out = tmp_path / "grounded.jsonl"
    local = tool.local_search(CORPUS)
    searched = []

    def search(query):
        searched.append(query)
        return local(query)

    with Writer() as server:
        judge = LLMJudge(server.url, "m", workers=1)
        task = tool.grounded_task(search)
        report = tool.write_rubrics(judge, task, str(source), str(out), False)
        assert report.written == 2
        assert searched == [COMMON_COLD, BLUE_SKY]

        # Killed while the second row was written.
        whole = out.read_bytes()
        out.write_bytes(whole[: whole.index(b"\n") + 40])
        report = tool.write_rubrics(judge, task, str(source), str(out), False)
    assert report.written == 1
    assert report.already_there == 1
    assert out.read_bytes() == whole
    assert searched == [COMMON_COLD, BLUE_SKY, BLUE_SKY]


def test_a_search_that_fails_in_between_keeps_what_is_written(tmp_path):
    questions = [f"What helps against a cold, version {k}?" for k in range(tool.BATCH + 1)]
    source = write_questions(tmp_path / "q.jsonl", questions)
    out = tmp_path / "grounded.jsonl"
    local = tool.local_search(CORPUS)
    searched = []

    def search(query):
        searched.append(query)
        if len(searched) > tool.BATCH:
            raise DataError("the search does not answer")
        return local(query)

    with Writer() as server:
        judge = LLMJudge(server.url, "m")
        with pytest.raises(DataError, match="the search does not answer"):
            task = tool.grounded_task(search)
            tool.write_rubrics(judge, task, str(source), str(out), False)
    assert len(rar.read_examples(out)) == tool.BATCH


def test_a_long_answer_is_asked_for_again_with_fewer_items(tmp_path):
    source = write_questions(tmp_path / "q.jsonl", [COMMON_COLD])

    class Short(Writer):
        async def answer(self, head, body):
            if "cut off" not in body["messages"][0]["content"]:
                self.script = ["cut"]
            return await super().answer(head, body)

    with Short() as server:
        judge = LLMJudge(server.url, "m")
        task = tool.grounded_task(tool.local_search(CORPUS))
        report = tool.write_rubrics(judge, task, str(source), str(tmp_path / "o.jsonl"), False)
        assert "at most 5 items" in server.bodies[-1]["messages"][0]["content"]
    assert report.written == 1


def test_the_offline_judge_has_no_writer():
    assert not hasattr(LexicalJudge(), "write")
