"""Notices that the machine is about to be taken away, from a server that stands in for Google's."""

import http.server
import signal
import threading
import time

import pytest

from safetydpo_jax.train import notices
from safetydpo_jax.train.workdir import Stop


@pytest.fixture
def server(monkeypatch):
    """What it answers, by the last part of the address."""
    answers = {"preempted": "FALSE", "maintenance-event": "NONE"}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.headers["Metadata-Flavor"] == "Google"
            home, _, name = self.path.rpartition("/")
            self.send_response(200 if home == "/computeMetadata/v1/instance" else 404)
            self.end_headers()
            self.wfile.write(answers[name].encode())

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        monkeypatch.setenv(notices.HOST, f"127.0.0.1:{found.server_address[1]}")
        monkeypatch.setattr(notices, "POLL_SECONDS", 0.02)
        yield answers
        found.shutdown()


def wait_for(what):
    end = time.monotonic() + 20
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("name", notices.NOTICES)
def test_a_notice(server, name):
    stop, said = Stop(), []
    with notices.heeded(stop, said.append):
        time.sleep(0.2)
        assert stop.asked is None
        server[name] = notices.NOTICES[name]
        wait_for(lambda: stop.asked)
    assert stop.asked == signal.SIGTERM
    assert said == [f"this machine is about to be taken away ({name})"]


def test_one_that_was_there_before(server):
    server["maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"
    stop = Stop()
    with notices.heeded(stop, print):
        time.sleep(0.3)
        assert stop.asked is None
        server["preempted"] = "TRUE"
        wait_for(lambda: stop.asked)


def test_no_server(monkeypatch):
    monkeypatch.setenv(notices.HOST, "127.0.0.1:1")
    monkeypatch.setattr(notices, "POLL_SECONDS", 0.02)
    said = []
    with notices.heeded(Stop(), said.append):
        wait_for(lambda: said)
        time.sleep(0.2)
    assert len(said) == 1  # it goes on asking, and says it once
    assert said[0].startswith(
        "no notices of preemption or maintenance: 127.0.0.1:1 does not answer"
    )


def test_elsewhere(monkeypatch):
    monkeypatch.delenv(notices.HOST, raising=False)
    before = threading.active_count()
    with notices.heeded(Stop(), print):
        assert threading.active_count() == before
