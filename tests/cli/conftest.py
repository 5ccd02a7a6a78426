"""A tiny random model in a folder, a text, and a way to run a command on them."""

from __future__ import annotations

import signal

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from memlong.cli.app import make_app

WORDS = [f"word{number}" for number in range(90)]
SIZES = {
    "--chunk-size": 4,
    "--top-k": 3,
    "--local-window": 24,
    "--segment-size": 8,
    "--dtype": "float32",
    "--retriever": "lm",
}


@pytest.fixture
def model_folder(tmp_path, llama):
    folder = tmp_path / "model"
    llama.save_pretrained(folder)
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {word: 3 + number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(folder)
    return folder


@pytest.fixture
def story(tmp_path):
    path = tmp_path / "story.txt"
    path.write_text(" ".join(WORDS[number * number % 89] for number in range(120)), encoding="utf-8")
    return path


@pytest.fixture
def arguments(model_folder):
    """What to type for a command on the tiny model; options by keyword, their dashes as underscores."""

    def words(command, **changes):
        options = {"--model": model_folder, **SIZES}
        options.update({"--" + name.replace("_", "-"): value for name, value in changes.items()})
        found = [command]
        for name, value in options.items():
            if value is True:
                found.append(name)
            else:
                for each in value if isinstance(value, list) else [value]:
                    found += [name, str(each)]
        return found

    return words


@pytest.fixture
def invoke(arguments):
    """Run a command on the tiny model, in this process."""
    return lambda command, **changes: CliRunner().invoke(make_app(), arguments(command, **changes))


@pytest.fixture(autouse=True)
def interrupts_as_before():
    """`main` leaves them to the system, as it is the end of its process."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)
