"""The bench of many sessions: what goes wrong is in its result, and ends it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.test_bench_results import script

pytest.importorskip("openai")


class Broken(BaseHTTPRequestHandler):
    """A server that is well, and answers nobody."""

    def do_GET(self):
        self._say(200, {"bytes": 7, "in_memory": 1})

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self._say(500, {"error": {"message": "out of breath"}})

    def log_message(self, *_):
        pass

    def _say(self, status, told):
        body = json.dumps(told).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture(scope="module")
def serving():
    return script("serving")


@pytest.fixture
def url():
    with ThreadingHTTPServer(("127.0.0.1", 0), Broken) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_what_a_user_got_instead_of_an_answer_is_kept(serving, url):
    users = [serving.User("a"), serving.User("b")]
    watch = serving.talk(users, ["one", "two"], url, "demo", 30, 4, os.getpid())
    assert watch.sessions == 7
    for user in users:
        assert user.answers == []
        assert "out of breath" in user.error


@pytest.mark.parametrize(
    ("error", "differ", "fails"), [(None, [], False), ("no", [], True), (None, [{"turn": 0}], True)]
)
def test_errors_and_other_answers_are_in_the_result_and_the_exit_status(
    serving, tmp_path, monkeypatch, capsys, error, differ, fails
):
    def talk(users, *_):
        for user in users:
            user.sent, user.answers, user.seconds, user.first = ["a"], ["b"], [1.0], [0.5]
        users[1].error = error
        return serving.Watch(2, 1, 1)

    monkeypatch.setattr(serving, "SERVER", tmp_path / "server.py")
    (tmp_path / "server.py").write_text("import time; time.sleep(100)", encoding="utf-8")
    monkeypatch.setattr(serving, "wait_for", lambda *_: None)
    monkeypatch.setattr(serving, "talk", talk)
    monkeypatch.setattr(serving, "repeat", lambda *_: differ)
    text, out = tmp_path / "text.txt", tmp_path / "serving.json"
    text.write_text("words", encoding="utf-8")
    given = {"users": 2, "seconds": 1, "budget": "1GB", "rows": 1, "text": text, "characters": 3}
    given |= {"max_tokens": 4, "model": "demo", "seed": 0, "out": out}
    if fails:
        with pytest.raises(SystemExit) as ended:
            serving.main(**given)
        assert ended.value.code == 1
    else:
        serving.main(**given)
    facts = json.loads(out.read_text(encoding="utf-8"))
    errors = [{"user": "user 1", "turn": 1, "error": "no"}] if error else []
    assert (facts["errors"], facts["differ"]) == (errors, differ)
    assert ("user 1 got no answer 2: no" in capsys.readouterr().out) == bool(error)


def test_a_server_that_never_answers_is_not_waited_for(serving):
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"]) as process:
        try:
            with pytest.raises(SystemExit, match=r"has not answered within 0\.1 s"):
                serving.wait_for(f"http://127.0.0.1:{serving.free_port()}", process, 0.1)
        finally:
            process.terminate()
