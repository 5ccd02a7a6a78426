"""However a command ends: an exit status and one line, and never a traceback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from memlong import create_bank
from memlong.cli import app
from memlong.testing.harness import DIM, random_chunks

posix = pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
PROGRAM = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from memlong.cli import main
main()
"""


@pytest.fixture
def saved(tmp_path):
    bank = create_bank("torch", DIM)
    random_chunks(3).into(bank)
    bank.save(tmp_path / "bank")
    return tmp_path / "bank"


@pytest.fixture(params=["", "1"], ids=["buffered", "unbuffered"])
def shell(request):
    """Run a command with something about its streams that only a shell can say."""

    def run(command, *arguments, ending=""):
        quoted = subprocess.list2cmdline([sys.executable, "-c", "from memlong.cli import main; main()"])
        environment = {**os.environ, "PYTHONUNBUFFERED": request.param, "WORK": command}
        words = " ".join(f"'{each}'" for each in arguments)
        done = subprocess.run(
            ["bash", "-c", f"{quoted} $WORK {words} {ending}"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert "Traceback" not in done.stderr
        assert "Exception ignored" not in done.stderr
        return done

    return run


COMMANDS = ["backends", "plugins", "--version", "--help", "bank info", "bank info --json"]


def of(command, saved):
    return [saved] if "bank" in command else []


@posix
@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")  # noqa: PTH110
@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_device(shell, saved, command):
    done = shell(command, *of(command, saved), ending="> /dev/full")
    assert done.returncode == 1
    *answer, line = done.stderr.strip().split("\n")
    assert line.startswith("memlong: Cannot print the result: No space left on device.")
    if "--json" in command:
        assert json.loads("\n".join(answer))["banks"][0]["chunks"] == 3  # not lost
    else:
        assert answer == []


@posix
@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_closed_output(shell, saved, command):
    done = shell(command, *of(command, saved), ending=">&-")
    assert done.returncode == 1
    assert done.stderr.startswith("memlong: Standard output is closed")
    assert len(done.stderr.splitlines()) == 1


@posix
@pytest.mark.slow
def test_other_closed_streams_change_nothing(shell, saved):
    for ending in ("<&-", "2>&-", "<&- 2>&-"):
        done = shell("bank info --json", saved, ending=ending)
        assert done.returncode == 0
        assert json.loads(done.stdout)["banks"][0]["chunks"] == 3


@posix
@pytest.mark.slow
def test_a_reader_that_has_had_enough(shell, saved):
    done = shell("bank info --json", saved, ending="| true; exit ${PIPESTATUS[0]}")
    assert done.returncode in (0, 1)
    assert done.stderr == ""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_that_nobody_reads_and_one_that_somebody_does(arguments, story, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    typed = [sys.executable, "-c", PROGRAM, *arguments("perplexity", text=story, json=pipe)]
    done = subprocess.run(typed, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.endswith(
        "pipe': it is a pipe without a reader. Start the reader first, or name a file\n"
    )
    found = []
    reader = threading.Thread(target=lambda: found.append(pipe.read_text()))
    reader.start()
    time.sleep(0.1)
    done = subprocess.run(typed, capture_output=True, text=True, timeout=100)
    reader.join()
    assert done.returncode == 0, done.stderr
    assert json.loads(found[0])["seed"] == 0


def interrupt(process, pauses):
    for pause in pauses:
        time.sleep(pause)
        process.send_signal(signal.SIGINT)
    return process.communicate(timeout=60)[1].decode()


@posix
@pytest.mark.slow
@pytest.mark.parametrize(
    "pauses", [(0.05,), (0.2,), (0.4,), (0.8,), (0.05, 0.02), (0.3, 0.01, 0.01), (0.8, 0.1)]
)
def test_interrupts_from_the_first_moment_on(arguments, tmp_path, pauses):
    book = tmp_path / "book.txt"
    book.write_text("word1 word2 word3 word4 " * 20_000, encoding="utf-8")
    typed = arguments("generate", context=book, prompt="word1")
    told = PROGRAM.replace("from memlong", "print(flush=True)\nfrom memlong", 1)
    command = [sys.executable, "-c", told, *typed]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            process.stdout.readline()  # Python itself has begun
            said = interrupt(process, pauses)
        finally:
            process.kill()
    assert "Traceback" not in said
    assert "Exception ignored" not in said
    assert process.returncode in (130, -signal.SIGINT)
    if len(pauses) == 1:
        assert said.splitlines()[-1] == "memlong: interrupted"


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 2 GiB\nC++")]
)
def test_too_little_memory(monkeypatch, capsys, error):
    def fail(**_):
        raise error

    monkeypatch.setattr("memlong.cli.app.make_app", lambda: fail)
    assert app.run() == 1
    said = capsys.readouterr().err
    assert said.startswith("memlong: Out of memory (")
    assert len(said.splitlines()) == 1


@posix
@pytest.mark.slow
def test_a_character_that_the_console_does_not_have(tmp_path):
    folder = tmp_path / "bänk"
    bank = create_bank("torch", DIM)
    random_chunks(3).into(bank)
    bank.save(folder)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "bank", "verify", str(folder)],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "are intact" in done.stdout
