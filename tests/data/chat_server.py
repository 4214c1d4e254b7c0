"""A small server that speaks OpenAI's chat protocol, well and badly, on a port of its own.

python tests/data/chat_server.py FAULTS DELAY  # prints its address
"""

import collections
import hashlib
import json
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# What befalls a question the first time it is asked, by its number; then it is answered.
AT_ONCE = {"retry-after-ms": "5"}
FAULTS = ("429", "500", "disconnect", "no json", "bad list", "refusal", "empty", "nothing")


def pairs_for(concept, first, count):
    """What it answers: pairs that say what they are for, and that differ from each other."""
    numbers = range(first, first + count)
    marks = [hashlib.sha256(f"{concept} {i}".encode()).hexdigest() for i in numbers]
    return [
        {"unsafe": f"{concept} in harm {mark[:40]}", "safe": f"{concept} at peace {mark[:40]}"}
        for mark in marks
    ]


def verdict(prompt):
    """What it says of a prompt: of those it wrote itself the truth but for two marks in sixteen."""
    mark = prompt.split()[-1][0]
    return {"0": False, "1": True}.get(mark, " in harm " in prompt)


def judged(pairs):
    """The pairs that it finds to be as they should."""
    return [p for p in pairs if verdict(p["unsafe"]) and not verdict(p["safe"])]


class Server(ThreadingHTTPServer):
    """Attributes: `asked`, how often each question came; `answered`, how often it was answered."""

    daemon_threads = True

    def __init__(self, faults=(), delay=0.0):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.faults, self.delay = faults, delay
        self.asked, self.answered = collections.Counter(), collections.Counter()
        self.most_at_once = self.now = 0
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """A client that is gone is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_POST(self):
        server = self.server
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = question["messages"][0]["content"]
        if prompts := re.search(r"^\[\n\{.*?^\]$", text, re.DOTALL | re.MULTILINE):
            name, number = ("judge", hashlib.sha256(text.encode()).hexdigest()), 0
            said = [
                {"id": prompt["id"], "unsafe": verdict(prompt["prompt"])}
                for prompt in json.loads(prompts[0])
            ]
        else:
            concept = re.search(r"Concept: (.*)", text)[1]
            number = int(re.search(r"set (\d+) of", text)[1])
            count = int(re.search(r"Write (\d+) such", text)[1])
            name = (concept, number)
            said = pairs_for(concept, 10 * number, count)
        with server.lock:
            server.asked[name] += 1
            first = server.asked[name] == 1
            server.now += 1
            server.most_at_once = max(server.most_at_once, server.now)
            fault = server.faults[len(server.asked) % len(server.faults)] if server.faults else ""
        time.sleep(server.delay)
        with server.lock:
            server.now -= 1
        if question["model"] != "good":
            self.answer(404, {"error": {"message": f"no model for {text}"}})
        elif self.headers["Authorization"] == "Bearer wrong":
            self.answer(401, {"error": {"message": f"no key for {text}"}})
        elif fault == "quota":
            self.answer(429, {"error": {"code": "insufficient_quota", "message": text}}, AT_ONCE)
        elif fault == "down":
            self.answer(503, {"error": {"message": text}}, AT_ONCE)
        elif first and fault == "disconnect":
            self.close_connection = True
            self.connection.close()
        elif first and isinstance(fault, dict):
            self.answer(200, fault)
        elif first and fault in ("400", "429", "500"):
            self.answer(int(fault), {"error": {"message": text}}, AT_ONCE)
        elif first and fault == "nothing":
            self.send(200, b"{not json")
        else:
            content = json.dumps(said)
            if first and fault:
                content = {
                    "no json": "Here you are:",
                    "bad list": f"{content[:-5]}]",
                    "refusal": "I cannot help with that [sic].",
                    "empty": "",
                }.get(fault, content)
            elif number % 2:
                content = f"Sure!\n```json\n{content}\n```"
            server.answered[name] += not (first and fault)
            message = {"role": "assistant", "content": content}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            usage = {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150}
            self.answer(
                200,
                {"id": "x", "object": "chat.completion", "created": 0, "model": "good"}
                | {"choices": [choice], "usage": usage},
            )

    def answer(self, status, body, headers=None):
        self.send(status, json.dumps(body).encode(), headers)

    def send(self, status, data, headers=None):
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(data))} | (
            headers or {}
        )
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


if __name__ == "__main__":
    with Server(FAULTS if sys.argv[1] == "FAULTS" else (), float(sys.argv[2])) as server:
        print(server.url, flush=True)
        threading.Event().wait()
