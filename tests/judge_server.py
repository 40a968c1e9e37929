"""A real HTTP server that speaks the chat-completions format, knows the right answers, and can
fail in every way.

Its answers are a hash of the statement, so a test can tell a right verdict from a wrong one. Used
in a thread by the tests, and as a process of its own by the benchmark:

    python tests/judge_server.py --delay 0.05 --faults 0.3
"""

import argparse
import asyncio
import gzip
import hashlib
import json
import random
import re
import threading

# What goes wrong, and the kind of the missing verdict when nothing else ever comes ("" for a fault
# through which the right verdict can be read).
FAULTS = {
    # The server is in trouble.
    "busy": "transport",
    "error": "transport",
    "unavailable": "transport",
    "drop": "transport",
    "slow": "transport",
    "drip": "transport",
    "half": "transport",
    "huge": "transport",
    "error_in_200": "transport",
    "flat_error_in_200": "transport",
    "error_text_in_200": "transport",
    "error_beside_choices": "transport",
    "error_of_zero_alone": "transport",
    "wait_for_ages": "transport",
    "early_hints": "transport",
    # The server answers, but not as a judge does.
    "no_json": "unparsable",
    "stream": "unparsable",
    "gzip": "unparsable",
    "list_body": "unparsable",
    "no_choices": "unparsable",
    "null_choice": "unparsable",
    "text_choices": "unparsable",
    "object_choices": "unparsable",
    "text_message": "unparsable",
    "empty_choices": "unparsable",
    "delta": "unparsable",
    "old_completion": "unparsable",
    "empty_body": "unparsable",
    "binary": "unparsable",
    "no_content": "unparsable",
    "partial": "unparsable",
    # The model answers, but gives no verdict.
    "no_verdict": "unparsable",
    "number_content": "unparsable",
    "object_content": "unparsable",
    "true_content": "unparsable",
    "empty_content": "unparsable",
    "nan": "unparsable",
    "braces": "unparsable",
    "deep": "unparsable",
    "only_thoughts": "unparsable",
    "example_only": "unparsable",
    "cut": "truncated",
    "refuse": "refused",
    "filter": "refused",
    "filter_status": "refused",
    "too_long": "too_long",
    # The verdict is there, in an unusual shape.
    "text_list": "",
    "parts": "",
    "reasoning": "",
    "think": "",
    "quotes_think": "",
    "raw_newline": "",
    "latex": "",
    "python_true": "",
    "text_usage": "",
    "null_usage": "",
    "list_usage": "",
    "nan_usage": "",
    "negative_usage": "",
    "number_finish": "",
    "chunked": "",
    "until_close": "",
    "byte_order_mark": "",
    "broken_utf8": "",
    "other_choice": "",
    "empty_refusal": "",
    "error_of_zero": "",
    "error_of_nulls": "",
    "blank_error": "",
    "empty_error": "",
    "null_error": "",
}
for status in (408, 409, 425, 502, 504, 520, 529, 599):
    FAULTS[f"status_{status}"] = "transport"
for status in (201, 202, 205, 299, 600, 999):
    FAULTS[f"status_{status}"] = "unparsable"
for status in (406, 411, 415, 418, 421, 428, 431, 451):
    FAULTS[f"status_{status}"] = "refused"
# After these the same question is asked once more, and then answered.
ASKED_AGAIN = ("busy", "error", "unavailable", "drop", "no_json", "no_verdict", "cut", "slow")
DRIP = object()
PROBE_STATEMENT = "Statement: Mentions water.\n"


def truth(statement: str) -> bool:
    """What this server holds to be true."""
    return hashlib.sha256(statement.encode()).digest()[0] % 2 == 0


class JudgeServer:
    """`with JudgeServer(delay, faults) as server:` serves at server.url until the block ends.

    faults: share of requests that go wrong. script: kinds of fault for the first requests, one
    each ("ok" for none). always: the kind of fault of every request. The first call of a client,
    by which it finds out what the server can do, is in `probes` and not in `bodies`; faults by
    script, share or `always` do not meet it.
    """

    def __init__(
        self,
        delay=0.0,
        faults=0.0,
        script=(),
        status=None,
        key=None,
        accepts_schema=True,
        slow=3.0,
        seed=0,
        port=0,
        always="",
        models=(),
        tls=None,
    ):
        self.delay = delay
        self.faults = faults
        self.script = list(script)
        self.status = status
        self.key = key
        self.accepts_schema = accepts_schema
        self.slow = slow
        self.port = port
        self.always = always
        self.models = list(models)
        self.tls = tls
        self.rng = random.Random(seed)
        self.bodies = []
        self.probes = []
        self.headers = []
        self.connections = 0
        self.running = 0
        self.most = 0
        self.keep = True
        self.hangs_up = False  # after each reply, without a word
        self.error = None  # why it does not serve
        self.usage = {"prompt_tokens": 10, "completion_tokens": 5}

    async def serve(self, reader, writer):
        """One connection: request after request until one side has enough."""
        self.connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin1")
                length = re.search(r"content-length: (\d+)", head, re.IGNORECASE)
                content = await reader.readexactly(int(length[1]) if length else 0)
                if head.startswith("GET"):
                    reply = self.list_models(head)
                else:
                    reply = await self.reply(head, json.loads(content))
                if reply is None:
                    break
                if reply is DRIP:
                    await self.drip(writer)
                writer.write(reply)
                await writer.drain()
                if self.hangs_up or reply.startswith(b"HTTP/1.0"):
                    break
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass
        finally:
            writer.close()

    def list_models(self, head):
        """The reply to GET /models."""
        if not head.startswith("GET /v1/models "):
            return http(404, {"detail": "Not Found"})
        return http(200, {"object": "list", "data": self.models})

    async def reply(self, head, body):
        """The reply to one request, which is counted."""
        if self.keep:
            kept = self.probes if is_probe(body) else self.bodies
            kept.append(body)
            self.headers.append(head)
        self.running += 1
        self.most = max(self.most, self.running)
        reply = await self.answer(head, body)
        self.running -= 1
        return reply

    async def drip(self, writer):
        """A body that comes one byte at a time and never ends."""
        writer.write(b"HTTP/1.1 200 x\r\nContent-Length: 1000000\r\n\r\n{")
        while True:
            writer.write(b" ")
            await writer.drain()
            await asyncio.sleep(0.02)

    def pick_fault(self, body):
        """The kind of fault that meets this request."""
        if is_probe(body):
            return "ok"
        if self.script:
            return self.script.pop(0)
        if self.always:
            return self.always
        if self.rng.random() < self.faults:
            return self.rng.choice(list(FAULTS))
        return "ok"

    async def answer(self, head, body):
        """The whole reply as bytes; None to hang up."""
        arrived = asyncio.get_running_loop().time()
        fault = self.pick_fault(body)
        if self.key and f"bearer {self.key}".lower() not in head.lower():
            return http(401, {"error": {"message": f"Incorrect API key: {head}"}})
        if self.status:
            return http(self.status, {"error": {"message": "the model `nobody` does not exist"}})
        if "response_format" in body and not self.accepts_schema:
            return http(400, {"error": {"message": "response_format is not supported"}})

        is_silent = fault in ("busy", "error", "unavailable", "wait", "drop", "no_json")
        text = ""
        if is_probe(body):
            text = JudgeServer.verdict(self, body)
        elif not is_silent:
            text = self.verdict(body)
        # What the answer costs to make is part of the delay: the benchmark measures the client.
        spent = asyncio.get_running_loop().time() - arrived
        await asyncio.sleep((self.slow if fault == "slow" else self.delay) - spent)
        return self.faulty(fault, text)

    def faulty(self, fault, text):
        """The reply with this text, spoilt by this fault."""
        if fault == "drop":
            return None
        if fault == "drip":
            return DRIP
        if fault in STATUSES:
            status, value, more = STATUSES[fault]
            return http(status, value, more)
        if fault in RAW_BODIES:
            return raw(200, RAW_BODIES[fault])
        if fault == "huge":
            return raw(200, b" " * 11_000_000 + completion(text))
        if fault == "half":
            return raw(200, completion(text))[:-20]
        if fault == "gzip":
            return raw(200, gzip.compress(completion(text)), "Content-Encoding: gzip\r\n")
        if fault == "early_hints":
            return b"HTTP/1.1 103 x\r\n\r\n" + raw(200, completion(text))
        if fault == "no_content":
            return raw(204, b"")
        if fault == "partial":
            return raw(206, completion(text))
        if fault.startswith("status_"):
            return http(int(fault.removeprefix("status_")), TRY_AGAIN)
        if fault in EMPTY_ERRORS:
            whole = json.loads(completion(text))
            return http(200, whole | {"error": EMPTY_ERRORS[fault]})
        if fault in USAGES:
            return raw(200, completion(text, usage=USAGES[fault]))
        if fault in ("number_finish", "other_choice", "empty_refusal"):
            return self.unusual_choice(fault, text)
        if fault in ("chunked", "until_close", "byte_order_mark", "broken_utf8"):
            return self.unusual_bytes(fault, text)
        if fault == "old_completion":
            return http(200, {"choices": [{"text": text, "finish_reason": "stop"}]})
        if fault == "delta":
            return http(200, {"choices": [{"delta": {"content": text}}]})
        if fault == "reasoning":
            return http(200, {"choices": [{"message": {"content": None, "reasoning_content": text}}]})
        if fault == "refuse":
            message = {"content": None, "refusal": "I cannot."}
            return http(200, {"choices": [{"message": message, "finish_reason": "stop"}]})
        if fault == "filter":
            choice = {"message": {"content": ""}, "finish_reason": "content_filter"}
            return http(200, {"choices": [choice]})
        if fault == "cut":
            return raw(200, completion(text[: len(text) // 2], "length", self.usage))
        return raw(200, completion(self.shape(fault, text)))

    def unusual_choice(self, fault, text):
        """A right answer among unusual fields."""
        choice = {"message": {"content": text, "refusal": None, "tool_calls": []}, "index": 0}
        if fault == "number_finish":
            choice["finish_reason"] = 5
        if fault == "empty_refusal":
            choice["message"]["refusal"] = ""
        return http(200, {"choices": [choice, {"message": {"content": '{"met": null}'}}]})

    def unusual_bytes(self, fault, text):
        """A right answer in unusual bytes."""
        body = completion(text)
        if fault == "byte_order_mark":
            return raw(200, b"\xef\xbb\xbf" + body)
        if fault == "broken_utf8":
            return raw(200, body.replace(b"by its hash", b"by its \xff\xfe hash"))
        if fault == "until_close":
            # The length is known only when the server hangs up: `serve` does it.
            return b"HTTP/1.0 200 OK\r\n\r\n" + body
        half = len(body) // 2
        chunks = b""
        for part in (body[:half], body[half:], b""):
            chunks += f"{len(part):x}\r\n".encode() + part + b"\r\n"
        return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks

    def shape(self, fault, text):
        """The content of the message under this fault."""
        shapes = {
            "no_verdict": "I would say that this is fine. {'met': true}",
            "number_content": 5,
            "object_content": {"met": True},
            "true_content": True,
            "empty_content": "",
            "nan": text.replace("true", "NaN").replace("false", "NaN"),
            "braces": "{" * 50_000,
            "deep": '{"a":' * 9_000,
            "only_thoughts": "<think>" + text,
            "example_only": text + ' Or rather: {"reason": "", "met": , "verdicts": ',
            "text_list": [text[:9], text[9:]],
            "parts": [{"type": "thinking", "thinking": "{"}, {"type": "text", "text": text}],
            "think": '<think>Maybe {"met": true}? Or {"verdicts": []}?</think>' + text,
            "quotes_think": text.replace("by its hash", "quotes <think>x</think> and </think>"),
            "raw_newline": text.replace("by its hash", "by\nits\thash"),
            "latex": text.replace("by its hash", r"by \(x \in A\) and \alpha"),
            "python_true": text.replace("true", "True").replace("false", "False"),
        }
        return shapes.get(fault, text)

    def verdict(self, body):
        """The text of a right answer."""
        text = body["messages"][-1]["content"]
        if '"verdicts"' not in text[-200:]:
            statement = text.rpartition("\n\nStatement: ")[2].partition("\n\nFirst give")[0]
            return json.dumps({"reason": "by its hash", "met": truth(statement)})
        listed = text.rpartition("\n\nStatements:\n")[2].partition("\n\nCheck each")[0]
        verdicts = []
        for name, statement in re.findall(r"^(S\d+): (.*)$", listed, re.MULTILINE):
            verdicts.append({"name": name, "reason": "by its hash", "met": truth(statement)})
        return json.dumps({"verdicts": verdicts})

    # ---- in a thread

    def __enter__(self):
        ready = threading.Event()
        self.thread = threading.Thread(target=self.work, args=(ready,), daemon=True)
        self.thread.start()
        ready.wait()
        if self.error is not None:
            raise self.error
        scheme = "https" if self.tls else "http"
        self.url = f"{scheme}://127.0.0.1:{self.port}/v1"
        return self

    def work(self, ready):
        """The thread: serves until the loop is stopped."""
        self.loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self.loop)
        starting = asyncio.start_server(
            self.serve, "127.0.0.1", self.port, limit=2**24, backlog=512, ssl=self.tls
        )
        try:
            server = self.loop.run_until_complete(starting)
            self.port = server.sockets[0].getsockname()[1]
        except Exception as error:  # noqa: BLE001
            # A port that is taken must reach the caller, who waits for us.
            self.error = error
            self.loop.close()
            return
        finally:
            ready.set()
        self.loop.run_forever()

        server.close()
        tasks = asyncio.all_tasks(self.loop)
        for task in tasks:
            task.cancel()
        self.loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self.loop.close()

    def __exit__(self, *_):
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)


def is_probe(body):
    """Whether a request is the first call of a client, by which it finds out what there is."""
    content = body["messages"][-1]["content"]
    return PROBE_STATEMENT in content and "Drink water." in content


def completion(content, finish="stop", usage=...):
    """The body of a usual reply."""
    if usage is ...:
        usage = {"prompt_tokens": 10, "completion_tokens": 5}
    choice = {"message": {"role": "assistant", "content": content}, "finish_reason": finish}
    return json.dumps({"choices": [choice], "usage": usage}).encode()


def raw(status, content, more=""):
    """A reply with this body."""
    length = f"Content-Length: {len(content)}\r\n"
    head = f"HTTP/1.1 {status} x\r\nContent-Type: application/json\r\n{length}{more}\r\n"
    return head.encode() + content


def http(status, value, more=""):
    """A reply with this value as JSON."""
    return raw(status, json.dumps(value).encode(), more)


TRY_AGAIN = {"error": {"message": "try again"}}
LONG = "This model's maximum context length is 4096 tokens. Please reduce the length."
STATUSES = {
    "busy": (429, TRY_AGAIN, "Retry-After: 0\r\n"),
    "error": (500, TRY_AGAIN, ""),
    "unavailable": (503, TRY_AGAIN, ""),
    "wait": (429, {}, "Retry-After: 1\r\n"),
    "wait_for_ages": (429, {}, "Retry-After: Wed, 21 Oct 999999999999 07:28:00 GMT\r\n"),
    "error_in_200": (200, {"error": {"code": 429, "message": "slow down"}}, ""),
    "flat_error_in_200": (200, {"object": "error", "code": 429, "message": "slow down"}, ""),
    "error_text_in_200": (200, {"error": "overloaded"}, ""),
    "error_beside_choices": (200, {"choices": [{}], "error": {"message": "overloaded"}}, ""),
    "error_of_zero_alone": (200, {"error": {"code": 0, "message": ""}}, ""),
    "filter_status": (400, {"error": {"code": "content_filter", "message": "no"}}, ""),
    "too_long": (400, {"error": {"message": LONG}}, ""),
    "no_choices": (200, {"choices": None}, ""),
    "null_choice": (200, {"choices": [None]}, ""),
    "text_choices": (200, {"choices": "abc"}, ""),
    "object_choices": (200, {"choices": {"0": {"message": {}}}}, ""),
    "text_message": (200, {"choices": [{"message": '{"met": true}'}]}, ""),
    "list_body": (200, [{"met": True}], ""),
    "empty_choices": (200, {"choices": []}, ""),
}
USAGES = {
    "text_usage": "some",
    "null_usage": None,
    "list_usage": [1, 2],
    "nan_usage": {"prompt_tokens": float("nan"), "completion_tokens": 1e300},
    "negative_usage": {"prompt_tokens": -5, "completion_tokens": True},
}
EMPTY_ERRORS = {
    "error_of_zero": {"code": 0, "message": ""},
    "error_of_nulls": {"code": None, "message": None, "type": ""},
    "blank_error": " ",
    "empty_error": {},
    "null_error": None,
}
RAW_BODIES = {
    "no_json": b"<html>proxy error</html>",
    "empty_body": b"",
    "binary": bytes(range(256)),
    "stream": b'data: {"choices": [{"delta": {"content": "{"}}]}\n\ndata: [DONE]\n\n',
}


def main():
    """Serves until it is killed; prints its URL first."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--delay", type=float, default=0.05)
    parser.add_argument("--faults", type=float, default=0.0)
    parser.add_argument("--slow", type=float, default=3.0)
    args = parser.parse_args()
    with JudgeServer(args.delay, args.faults, slow=args.slow) as server:
        server.keep = False
        print(server.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
