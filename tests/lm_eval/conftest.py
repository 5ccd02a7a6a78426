"""A random model with a tokenizer of words, in a folder; and texts to make prompts of."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

pytest.importorskip("lm_eval")

WORDS = ["<s>", "</s>", "?", *(f"w{number}" for number in range(90))]
BOOK = " ".join(f"Sentence {number} of this book tells little." for number in range(3000))
PEOPLE = ("Mary", "John", "Sandra")
PLACES = ("bathroom", "bedroom", "garden", "kitchen")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from memlong.testing import tiny_model as make

    path = tmp_path_factory.mktemp("model")
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="?", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.chat_template = (
        "{% for turn in messages %}{{ turn['role'] }} {{ turn['content'] }} {% endfor %}"
    )
    tokenizer.save_pretrained(path)
    make().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def book(tmp_path_factory):
    path = tmp_path_factory.mktemp("book") / "book.txt"
    path.write_text(BOOK, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def babi(tmp_path_factory):
    """A folder in bAbI's format: for each task ten stories with two questions each."""
    path = tmp_path_factory.mktemp("babi")
    draw = random.Random(0)  # noqa: S311
    lines = []
    for _story in range(10):
        for number in range(1, 7):
            if number % 3:
                who, where = draw.choice(PEOPLE), draw.choice(PLACES)
                lines.append(f"{number} {who} moved to the {where}.")
            else:
                lines.append(f"{number} Where is {who}? \t{where}\t{number - 1}")
    for task in range(1, 6):
        (path / f"qa{task}_of-some-kind_test.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def given(folder, book, babi):
    return {
        "tokenizer": str(folder),
        "haystack": str(book),
        "babi": str(babi),
        "max_seq_lengths": [1024, 2048],
        "samples": 2,
    }
