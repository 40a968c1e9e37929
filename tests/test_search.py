"""The three searches, against a local server that speaks the two services' formats; grounded rubrics from end to end."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlparse

import pytest
from conftest import ROOT
from judge_server import JudgeServer

import rar
import rler
import train
from judge import LLMJudge
from rar import DataError
from rler import Snippet


class Service:
    """`with Service(replies) as service:` answers requests with (status, body), one each, the last one for ever."""

    def __init__(self, *replies):
        self.replies, self.requests = list(replies), []

    def __enter__(self):
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"]))) if self.command == "POST" else None
                outer.requests.append({"path": self.path, "headers": dict(self.headers), "body": body})
                status, reply = outer.replies.pop(0) if len(outer.replies) > 1 else outer.replies[0]
                content = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/search"
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


SERPER = {"searchParameters": {"q": "x"}, "organic": [
    {"title": "Colds", "link": "https://a.example/1", "snippet": "Rest helps\na cold.", "position": 1},
    {"title": "No text", "link": "https://a.example/2", "position": 2},
    {"title": "Colds", "link": "https://a.example/1", "snippet": "Rest helps\na cold.", "position": 3},
    {"title": "Water", "link": "https://a.example/3", "snippet": "Drink water.", "position": 4},
]}  # fmt: skip
SCHOLAR = {"data": [
    {"score": 0.9, "paper": {"corpusId": "12", "title": "On colds"}, "snippet": {"text": "We find that rest helps.", "snippetKind": "body"}},
    {"score": 0.8, "paper": {"title": "Untitled id"}, "snippet": {"text": "Water helps."}},
    {"score": 0.7, "paper": None, "snippet": None},
], "retrievalVersion": "1"}  # fmt: skip


def test_a_web_search(monkeypatch):
    monkeypatch.setenv("SERPER_API_KEY", "secret-key")
    with Service((200, SERPER)) as service:
        found = rler.web_search(k=2, url=service.url)("what helps?")
        [asked] = service.requests
    assert found == [Snippet("https://a.example/1", "Colds", "Rest helps a cold."), Snippet("https://a.example/3", "Water", "Drink water.")]
    assert asked["body"] == {"q": "what helps?", "num": 2} and asked["headers"]["X-API-KEY"] == "secret-key"


def test_a_web_search_needs_a_key(monkeypatch):
    monkeypatch.delenv("SERPER_API_KEY", raising=False)
    with pytest.raises(DataError, match="SERPER_API_KEY"):
        rler.web_search()


@pytest.mark.parametrize("key", ["", "s2-secret"])
def test_a_scholarly_search(monkeypatch, key):
    monkeypatch.setenv("S2_API_KEY", key)
    with Service((200, SCHOLAR)) as service:
        found = rler.scholar_search(k=5, url=service.url)("rest & water?")
        [asked] = service.requests
    assert found == [Snippet("CorpusId:12", "On colds", "We find that rest helps."), Snippet("CorpusId:Untitled id", "Untitled id", "Water helps.")]
    assert parse_qs(urlparse(asked["path"]).query) == {"query": ["rest & water?"], "limit": ["5"]}
    assert {k.lower(): v for k, v in asked["headers"].items()}.get("x-api-key", "") == key


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_service_is_asked_again(monkeypatch, status):
    monkeypatch.setenv("SERPER_API_KEY", "k")
    with Service((status, {"message": "later"}), (200, SERPER)) as service:
        assert len(rler.web_search(url=service.url)("x")) == 2
        assert len(service.requests) == 2


@pytest.mark.parametrize(
    ("status", "reply"),
    [(403, {"message": "Unauthorized key secret-key."}), (400, {"error": "bad"}), (200, b"<html>"), (200, []), (302, b""), (200, b"\xff\xfe")],
)
def test_what_no_retry_mends_is_one_line_without_the_key(monkeypatch, status, reply):
    monkeypatch.setenv("SERPER_API_KEY", "secret-key")
    with Service((status, reply)) as service:
        with pytest.raises(DataError) as caught:
            rler.web_search(url=service.url)("x")
        assert len(service.requests) == 1
    assert "secret-key" not in str(caught.value) and "\n" not in str(caught.value) and service.url in str(caught.value)


def test_a_service_that_is_not_there(monkeypatch):
    monkeypatch.setenv("SERPER_API_KEY", "secret-key")
    with Service((200, SERPER)) as service:
        pass
    monkeypatch.setattr(rler, "Retry", lambda *_, **__: 0)  # the waiting between tries is tested above
    with pytest.raises(DataError, match="cannot be reached"):
        rler.web_search(url=service.url)("x")


@pytest.mark.parametrize("reply", [{}, {"organic": None}, {"organic": []}, {"organic": ["text", {"snippet": 3, "link": "l"}]}])
def test_nothing_found_is_an_empty_list(monkeypatch, reply):
    monkeypatch.setenv("SERPER_API_KEY", "k")
    with Service((200, reply)) as service:
        assert [s.text for s in rler.web_search(url=service.url)("x")] == []


def test_no_more_than_k_are_taken(monkeypatch):
    """Some services give more than they are asked for."""
    monkeypatch.setenv("SERPER_API_KEY", "k")
    row = lambda n: {"organic": {"link": f"l{n}", "title": "t", "snippet": f"s{n}"}, "data": {"paper": {"corpusId": n}, "snippet": {"text": f"s{n}"}}}
    for search, key in ((rler.web_search, "organic"), (rler.scholar_search, "data")):
        with Service((200, {key: [row(n)[key] for n in range(4)]})) as service:
            assert [s.text for s in search(k=2, url=service.url)("x")] == ["s0", "s1"]


# ------------------------------------------------------------------------------------------- local documents


def test_bm25_over_the_corpus_finds_the_passage():
    passages = [json.loads(line) for line in rler.CORPUS.read_text(encoding="utf8").split("\n") if line]
    assert len(passages) >= 150 and len({p["id"] for p in passages}) == len(passages)
    search, first = rler.local_search(rler.CORPUS, 3), 0
    for p in passages:  # a passage is found by its own title and first words
        found = [s.id for s in search(p["title"] + " " + " ".join(p["text"].split()[:8]))]
        first += found[0] == p["id"]
    assert first >= 0.95 * len(passages)


def test_rare_words_weigh_more_and_titles_more_than_text(tmp_path):
    path = tmp_path / "docs.jsonl"
    rows = [("1", "Water", "The scurvy of sailors."), ("2", "Scurvy", "A lack of fruit."), ("3", "Water", "Water is wet, water is blue.")]
    path.write_text("".join(json.dumps({"id": i, "title": t, "text": x}) + "\n" for i, t, x in rows))
    search = rler.local_search(path)
    assert [s.id for s in search("Which water helps sailors with scurvy?")][0] == "1"  # two rare words
    assert [s.id for s in search("scurvies")][0] == "2"  # stemmed, and the title counts twice


@pytest.mark.parametrize("query", ['water" OR title:x', "NEAR(a b)", "a* AND ^b", "", "the of is", "({[", "\x00", "水 на", "' ; DROP TABLE passages"])
def test_no_question_is_read_as_query_language(query):
    assert isinstance(rler.local_search(rler.CORPUS)(query), list)


def test_a_folder_of_text_files(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "colds.md").write_text("# Colds\n\nRest helps.\n\n\nWater helps too.\n")
    (tmp_path / "odd.txt").write_bytes(b"caf\xe9 scurvy")
    (tmp_path / "picture.png").write_bytes(b"rest")
    search = rler.local_search(tmp_path)
    assert search("rest") == [Snippet("sub/colds.md#2", "colds", "Rest helps.")]
    assert search("scurvy")[0].id == "odd.txt#1"


@pytest.mark.parametrize("content", ["not json\n", '{"id": 1}\n', "[1, 2]\n", ""])
def test_documents_that_are_none_are_one_line(tmp_path, content):
    path = tmp_path / "docs.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match="docs.jsonl"):
        rler.local_search(path)


# ------------------------------------------------------------------------------------------- grounded rubrics


class Writer(JudgeServer):
    """Writes a rubric that cites snippet 1 twice and snippet 99, which does not exist; with questions about lead it fails."""

    def verdict(self, body):
        prompt = body["messages"][0]["content"]  # the last one may be the request to answer once more
        if "lead poisoning" in prompt.partition("Snippet 1,")[0]:
            return "I would rather not."
        fact = re.search(r"\nSnippet 1, .*:\n`+\n(.*)", prompt)[1].split(".")[0]
        items = [("critical", f"States that {fact}.", 1), ("valuable", "States that it is so.", 1), ("critical", "States a falsehood.", 99),
                 ("context", f"states that {fact}", 1), ("odd", "Says when.", 2), ("valuable", "", 1)]  # fmt: skip
        return json.dumps({"rubric": [{"tier": t, "title": "T", "text": x, "snippet": n} for t, x, n in items]})


def test_grounded_rubrics_are_written_cited_and_trained_on(tmp_path, capsys, tiny):
    questions = tmp_path / "q.jsonl"
    said = ["What helps against a common cold?", "Why is the sky blue?", "How is lead poisoning treated?", "qqqqqq zzzzzz?"]
    questions.write_text("".join(json.dumps({"id": f"q{n}", "question": q}) + "\n" for n, q in enumerate(said)))
    out = tmp_path / "grounded.jsonl"
    with Writer() as server:
        flags = ["--ground", str(questions), "--judge", server.url, "--judge_model", "m", "--judge_cache", str(tmp_path / "cache.jsonl")]
        assert rler.main([*flags, "--search", str(rler.CORPUS), "--out", str(out)]) == 0
        prompts = [body["messages"][0]["content"] for body in server.bodies]
    assert "2 of 4 questions have a rubric" in capsys.readouterr().out
    assert all("Snippet 1, " in p for p in prompts) and not any("qqqqqq" in p for p in prompts)  # nothing found, nothing asked
    rows = [json.loads(line) for line in out.read_text().split("\n") if line]
    corpus = {json.loads(line)["id"] for line in rler.CORPUS.read_text().split("\n") if line}
    for row in rows:
        assert [(i["category"], i["weight"]) for i in row["rubric"]] == [("Essential", 5), ("Important", 3), ("Important", 3)]
        assert not any("falsehood" in i["text"] for i in row["rubric"])  # what cites nothing is dropped
        assert all(i["citation"]["id"] in corpus and i["citation"]["text"] for i in row["rubric"])
    examples = rar.read_examples(out)
    method = rler.RLER(LLMJudge("http://127.0.0.1:9", "m"))
    persistent = method.buffer(examples[0]).persistent
    assert [i.text for i in persistent] == [i["text"] for i in rows[0]["rubric"]] and persistent[0].weight > persistent[1].weight
    few = ["--steps", "1", "--prompts_per_step", "1", "--group_size", "2", "--max_new_tokens", "4", "--out", str(tmp_path / "run")]
    assert train.main(["--method", "rler", "--model", str(tiny), "--data", str(out), "--eval_data", str(ROOT / "data" / "heldout.jsonl"), *few]) == 0
    capsys.readouterr()
    assert rler.main(["--history", str(tmp_path / "run")]) == 0
    told = capsys.readouterr().out
    assert any(row["rubric"][0]["text"][:40] in told for row in rows)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "--ground needs --judge URL"),
        (["--judge", "http://127.0.0.1:9/v1", "--judge_model", "m", "--search", "no-such-folder"], "no passages"),
        (["--judge", "http://127.0.0.1:9/v1", "--judge_model", "m", "--search", "web"], "SERPER_API_KEY"),
    ],
)
def test_what_cannot_work_is_one_line(tmp_path, capsys, monkeypatch, flags, words):
    monkeypatch.delenv("SERPER_API_KEY", raising=False)
    questions = tmp_path / "q.jsonl"
    questions.write_text('{"question": "Why?"}\n')
    assert rler.main(["--ground", str(questions), "--out", str(tmp_path / "out.jsonl"), *flags]) == 2
    said = capsys.readouterr().err.strip()
    assert words in said and "\n" not in said and not (tmp_path / "out.jsonl").exists()


def test_grounding_goes_on_where_it_was_stopped(tmp_path, capsys):
    """A row that is there is not asked for again; a search service is billed by the call, so it is not searched for either."""
    questions, out = tmp_path / "q.jsonl", tmp_path / "grounded.jsonl"
    questions.write_text("".join(json.dumps({"id": f"q{n}", "question": q}) + "\n" for n, q in enumerate(["What helps against a common cold?", "Why is the sky blue?"])))
    searched = []

    def search(query):
        searched.append(query)
        return rler.local_search(rler.CORPUS)(query)

    with Writer() as server:
        judge = LLMJudge(server.url, "m")
        assert rler.ground(judge, search, str(questions), str(out))["written"] == 2
        whole = out.read_bytes()
        out.write_bytes(whole[: whole.index(b"\n") + 40])  # killed while the second row was written
        counts = rler.ground(judge, search, str(questions), str(out))
    assert counts["written"] == counts["already_there"] == 1 and out.read_bytes() == whole
    assert searched == ["What helps against a common cold?", "Why is the sky blue?", "Why is the sky blue?"]
