"""A real HTTP server that speaks the chat-completions format, knows the right answers, and can fail in every way.

Its answers are a hash of the statement, so a test can tell a right verdict from a wrong one. Used in a thread by the
tests, and as a process of its own by the benchmark: python tests/judge_server.py --delay 0.05 --faults 0.3
"""

import argparse
import asyncio
import hashlib
import json
import random
import re
import threading

FAULTS = ("busy", "error", "unavailable", "drop", "no_json", "no_verdict", "cut", "slow")


def truth(statement: str) -> bool:
    """What this server holds to be true."""
    return hashlib.sha256(statement.encode()).digest()[0] % 2 == 0


class JudgeServer:
    """`with JudgeServer(delay, faults) as server:` serves at server.url until the block ends.

    faults: share of requests that go wrong. script: kinds of fault for the first requests, one each ("ok" for none).
    """

    def __init__(self, delay=0.0, faults=0.0, script=(), status=None, key=None, accepts_schema=True, slow=3.0, seed=0, port=0):
        self.delay, self.faults, self.script, self.status, self.key = delay, faults, list(script), status, key
        self.accepts_schema, self.slow, self.port = accepts_schema, slow, port
        self.rng, self.bodies, self.connections, self.running, self.most = random.Random(seed), [], 0, 0, 0
        self.headers, self.keep = [], True

    async def serve(self, reader, writer):
        self.connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin1")
                length = int(re.search(r"content-length: (\d+)", head, re.I)[1])
                body = json.loads(await reader.readexactly(length))
                if self.keep:
                    self.bodies.append(body)
                    self.headers.append(head)
                self.running += 1
                self.most = max(self.most, self.running)
                reply = await self.answer(head, body)
                self.running -= 1
                if reply is None:
                    break
                writer.write(reply)
                await writer.drain()
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass
        finally:
            writer.close()

    async def answer(self, head, body):
        arrived = asyncio.get_running_loop().time()
        fault = self.script.pop(0) if self.script else self.rng.choice(FAULTS) if self.rng.random() < self.faults else "ok"
        if self.key and f"bearer {self.key}".lower() not in head.lower():
            return http(401, {"error": {"message": f"Incorrect API key: {head}"}})
        if self.status:
            return http(self.status, {"error": {"message": "the model `nobody` does not exist"}})
        if "response_format" in body and not self.accepts_schema:
            return http(400, {"error": {"message": "response_format is not supported"}})
        spoken = fault not in ("busy", "error", "unavailable", "wait", "drop", "no_json")
        text, finish = self.verdict(body) if spoken else "", "stop"
        # What the answer costs to make is part of the delay: the benchmark is about the client, not about this server.
        await asyncio.sleep((self.slow if fault == "slow" else self.delay) - (asyncio.get_running_loop().time() - arrived))
        if fault in ("busy", "error", "unavailable"):
            return http({"busy": 429, "error": 500, "unavailable": 503}[fault], {"error": {"message": "try again"}}, "Retry-After: 0\r\n" if fault == "busy" else "")
        if fault == "wait":
            return http(429, {}, "Retry-After: 1\r\n")
        if fault == "drop":
            return None
        if fault == "no_json":
            return raw(200, b"<html>proxy error</html>")
        if fault == "no_verdict":
            text = "I would say that this is fine. {'met': true}"
        if fault == "cut":
            text, finish = text[: len(text) // 2], "length"
        if fault == "refuse":
            return http(200, {"choices": [{"message": {"content": None, "refusal": "I cannot."}, "finish_reason": "stop"}]})
        return http(200, {"choices": [{"message": {"content": text}, "finish_reason": finish}], "usage": {"prompt_tokens": 10, "completion_tokens": 5}})

    def verdict(self, body):
        text = body["messages"][-1]["content"]
        one = text.rpartition("\n\nStatement: ")[2]
        if '"verdicts"' not in text[-200:]:
            return json.dumps({"reason": "by its hash", "met": truth(one.partition("\n\nFirst give")[0])})
        listed = text.rpartition("\n\nStatements:\n")[2].partition("\n\nCheck each")[0]
        named = re.findall(r"^(S\d+): (.*)$", listed, re.M)
        return json.dumps({"verdicts": [{"name": n, "reason": "by its hash", "met": truth(s)} for n, s in named]})

    # ---- in a thread

    def __enter__(self):
        ready = threading.Event()

        def work():
            self.loop = asyncio.new_event_loop()
            asyncio.set_event_loop(self.loop)
            server = self.loop.run_until_complete(asyncio.start_server(self.serve, "127.0.0.1", self.port, limit=2**24, backlog=512))
            self.port = server.sockets[0].getsockname()[1]
            ready.set()
            self.loop.run_forever()
            server.close()
            tasks = asyncio.all_tasks(self.loop)
            for task in tasks:
                task.cancel()
            self.loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            self.loop.close()

        self.thread = threading.Thread(target=work, daemon=True)
        self.thread.start()
        ready.wait()
        self.url = f"http://127.0.0.1:{self.port}/v1"
        return self

    def __exit__(self, *_):
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)


def raw(status, content, more=""):
    return f"HTTP/1.1 {status} x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n{more}\r\n".encode() + content


def http(status, value, more=""):
    return raw(status, json.dumps(value).encode(), more)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--delay", type=float, default=0.05)
    parser.add_argument("--faults", type=float, default=0.0)
    parser.add_argument("--slow", type=float, default=3.0)
    args = parser.parse_args()
    with JudgeServer(args.delay, args.faults, slow=args.slow) as server:
        server.keep = False
        print(server.url, flush=True)
        threading.Event().wait()
