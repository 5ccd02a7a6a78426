"""A random model with a tokenizer of words, in a folder; and texts to make prompts of."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

pytest.importorskip("lm_eval")

WORDS = ["<s>", "</s>", "?", *(f"w{number}" for number in range(90))]
BOOK = " ".join(f"Sentence {number} of this book tells little." for number in range(3000))
FILLER = "and of other things that lie there nothing else is told, as none of them matters to anyone here."
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


@pytest.fixture(scope="session")
def squad(tmp_path_factory):
    """A file in SQuAD's format: ten articles of ten paragraphs, with a question each that can be answered."""
    articles = [
        {"paragraphs": [paragraph(f"{article}-{number}") for number in range(10)]} for article in range(10)
    ]
    path = tmp_path_factory.mktemp("squad") / "dev.json"
    path.write_text(json.dumps({"data": articles}), encoding="utf-8")
    return path


def paragraph(name):
    sure = {
        "question": f"What holds box {name}?",
        "answers": [{"text": f"stone {name}"}, {"text": "stone"}],
        "is_impossible": False,
    }
    unsure = {
        "question": "Why?",
        "answers": [],
        "is_impossible": True,
        "plausible_answers": [{"text": "box"}],
    }
    return {"context": f"The box {name} holds a stone {name} {FILLER}", "qas": [unsure, sure]}


@pytest.fixture(scope="session")
def hotpotqa(tmp_path_factory):
    """A file in HotpotQA's format: twenty questions, with five documents each."""
    questions = [
        {
            "question": f"Where is box {number}-3?",
            "answer": f"room {number}-3",
            "context": [
                [f"Box {number}-{part}", [f"It is in room {number}-{part}", f" {FILLER}"]]
                for part in range(5)
            ],
            "supporting_facts": [[f"Box {number}-{part}", 0] for part in (0, 3)],
        }
        for number in range(20)
    ]
    path = tmp_path_factory.mktemp("hotpotqa") / "dev.json"
    path.write_text(json.dumps(questions), encoding="utf-8")
    return path


@pytest.fixture
def given(folder, book, babi, squad, hotpotqa):
    return {
        "tokenizer": str(folder),
        "haystack": str(book),
        "babi": str(babi),
        "squad": str(squad),
        "hotpotqa": str(hotpotqa),
        "max_seq_lengths": [1024, 2048],
        "samples": 2,
    }
