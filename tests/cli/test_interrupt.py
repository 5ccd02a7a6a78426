"""Ctrl-C while a command works: one line, exit code 130, and nothing left behind."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

# A shell that starts a program in the background has it ignore the signal: take it up again, as a terminal would.
PROGRAM = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from memlong.cli import main
main()
"""


@pytest.mark.slow
def test_ctrl_c_while_a_text_is_read(arguments, tmp_path):
    book, tier = tmp_path / "book.txt", tmp_path / "tier"
    book.write_text("word1 word2 word3 word4 " * 20_000, encoding="utf-8")
    tier.mkdir()
    typed = arguments("generate", context=book, prompt="word1", store=[f"disk={tier}", "host=1MB"])
    with subprocess.Popen([sys.executable, "-c", PROGRAM, *typed], stderr=subprocess.PIPE) as process:
        try:
            said = bytearray()
            while b"reading" not in said or b"tok/s" not in said:  # the bar moves: the text is being read
                read = process.stderr.read1()
                assert read, said.decode()
                said += read
            process.send_signal(signal.SIGINT)
            said += process.stderr.read()
            assert process.wait(timeout=60) == 130
        finally:
            process.kill()
    assert said.decode().splitlines()[-1] == "memlong: interrupted"
    assert "Traceback" not in said.decode()
    assert list(tier.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_an_interrupt_that_a_library_makes_an_error_of():
    program = PROGRAM.replace("from", "import os\nfrom").replace(
        "main()",
        """
from memlong.cli import app
def run():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        input()
    except KeyboardInterrupt:
        raise ModuleNotFoundError("Could not import module") from None
app.run = run
main()
""",
    )
    done = subprocess.run([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 130
    assert done.stderr.split("\n") == ["", "memlong: interrupted", ""]
