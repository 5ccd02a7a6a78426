"""A random model with a tokenizer of words, in a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

pytest.importorskip("lm_eval")

WORDS = ["<s>", "</s>", "?", *(f"w{number}" for number in range(90))]


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
