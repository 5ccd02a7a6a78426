"""Whatever a console can show, and whatever a model says: no traceback, and no command to the terminal."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from memlong.decoder.stream.streamer import printable, text_streamer

PROGRAM = "from memlong.cli import main; main()"
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.fixture
def strange_model(model_folder):
    """A model whose words hold what is hard to print."""
    file = model_folder / "tokenizer.json"
    facts = json.loads(file.read_text(encoding="utf-8"))
    words = facts["model"]["vocab"]
    facts["model"]["vocab"] = {
        name.replace(
            "word", "w\N{LATIN SMALL LETTER O WITH DIAERESIS}rd\u65e5\u672c\x1b]0;x\x07\x9b2J"
        ): number
        for name, number in words.items()
    }
    file.write_text(json.dumps(facts), encoding="utf-8")
    return model_folder


def run(environment, *typed):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, typed)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
    )
    said = done.stdout + done.stderr
    assert b"Traceback" not in said
    assert done.returncode == 0, said
    assert b"\x1b" not in said
    assert b"\x07" not in said
    return done


@pytest.mark.slow
@pytest.mark.parametrize(
    ("console", "beams"),
    [
        ({"PYTHONIOENCODING": "latin-1"}, 1),
        ({"LC_ALL": "C"}, 1),
        (ASCII, 1),
        ({"PYTHONIOENCODING": "ascii"}, 2),
    ],
    ids=["latin-1", "C", "C without UTF-8", "ascii and beams"],
)
def test_an_answer_in_any_characters(strange_model, arguments, console, beams, tmp_path):
    context = tmp_path / "b\N{LATIN SMALL LETTER O WITH DIAERESIS}ok.txt"
    context.write_text("x " * 100)
    typed = arguments(
        "generate", context=context, prompt="x", max_new_tokens=8, beams=beams, json=tmp_path / "out.json"
    )
    done = run(console, *typed)
    assert rb"\x1b]0;x\x07\x9b2J" in done.stdout
    assert "\x1b" in json.loads((tmp_path / "out.json").read_text())["answer"]


@pytest.mark.slow
def test_bars_tables_and_help_in_any_characters(arguments, tmp_path):
    text = tmp_path / "t\N{LATIN SMALL LETTER E WITH ACUTE}xt\x1b[31m.txt"
    text.write_text("word1 word2 " * 50)
    assert b"perplexity" in run(ASCII, *arguments("perplexity", text=text)).stdout
    run(ASCII, *arguments("needle", lengths=100, depths=0, filler=text))
    run(ASCII, "perplexity", "--help")
    run(ASCII, "models", "qwen3")


class Console:
    encoding = "cp1252"

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text.encode(self.encoding).decode(self.encoding)

    def flush(self):
        pass


class Words:
    def decode(self, ids, **_):
        return "".join({1: "caf\xe9 ", 2: "\u65e5\u672c ", 3: "\x1b[2J ", 4: "a\nb\t "}[each] for each in ids)


def test_a_streamer_prints_escapes_in_a_users_own_interpreter(monkeypatch):
    import torch

    console = Console()
    monkeypatch.setattr(sys, "stdout", console)
    streamer = text_streamer(Words())
    for token in (1, 1, 2, 3, 4):  # the first is the prompt
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert console.text == "caf\xe9 \\u65e5\\u672c \\x1b[2J a\nb\t \n"


def test_letters_of_any_language_are_shown_as_they_are(monkeypatch):
    text = "\u65e5\u672c\u3000\u05e9 \U0001f469\u200d\U0001f680\n\tend"
    monkeypatch.setattr(sys, "stdout", type("", (), {"encoding": "utf-8"}))
    assert printable(text) == text
    assert printable("a\rb\x00\ud800") == r"a\rb\x00\ud800"
