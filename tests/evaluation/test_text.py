from __future__ import annotations

import codecs

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from memlong.errors import InvalidTextError
from memlong.evaluation import (
    chat_prompt,
    chat_turn,
    end_of_turn,
    following_turn,
    long_range_tokens,
    read_text,
    tokenize,
)
from memlong.evaluation.needle import passkey_prompt


def test_a_text_is_read_as_utf8(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("Nennt mich Ismaël.", encoding="utf-8")
    assert read_text(path) == "Nennt mich Ismaël."


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_files_of_other_editors_are_the_same_text(tmp_path, encoding, end):
    path = tmp_path / "text.txt"
    path.write_bytes(f"Nennt mich{end}Ismaël".encode(encoding))
    assert read_text(path) == "Nennt mich\nIsmaël"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"", "is empty"),
        (b" \n\t\n", "is empty"),
        (b"\x7fELF\0\0", "is binary"),
        ("Ismaël".encode("latin-1"), "must be UTF-8, got .* at byte 4"),
        ("Ismaël".encode("utf-16-le"), "is binary, or UTF-16 without a byte-order mark"),
        (codecs.BOM_UTF16_LE + b"abc", "must be UTF-16, got .* at byte 4"),
    ],
)
def test_a_file_that_is_no_text_is_named_with_the_reason(tmp_path, content, message):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InvalidTextError, match=message) as raised:
        read_text(path)
    assert str(path) in str(raised.value)


def test_a_folder_is_no_text(tmp_path):
    with pytest.raises(InvalidTextError, match="Cannot read the text file"):
        read_text(tmp_path)


def test_tokens_are_cut_to_the_first_ones():
    class Words:
        def __call__(self, text, **_):
            return type("Encoding", (), {"input_ids": [len(word) for word in text.split()]})

    assert tokenize(Words(), "a bb ccc dddd", 3).tolist() == [[1, 2, 3]]
    assert tokenize(Words(), "a bb ccc dddd").tolist() == [[1, 2, 3, 4]]


@pytest.fixture
def begins():
    """A tokenizer that puts <s> before a text and </s> behind it."""
    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "?": 2, "who": 3, "user": 4}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="?"
    )
    tokenizer.chat_template = "{{ bos_token }} user {{ messages[0]['content'] }}"
    return tokenizer


def test_special_tokens_stand_where_a_stream_begins_and_nowhere_else(begins):
    assert tokenize(begins, "who who").tolist() == [[0, 3, 3]]
    assert tokenize(begins, "who who", 2).tolist() == [[0, 3]]
    assert tokenize(begins, "who who", begins=False).tolist() == [[3, 3]]
    assert chat_turn(begins, "who").tolist() == [[0, 4, 3]]
    assert chat_turn(begins, "who", begins=False).tolist() == [[4, 3]]


def test_names_of_control_tokens_in_a_text_are_text(begins):
    begins.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    assert tokenize(begins, "who <|end|> who", begins=False).tolist() == [[3, 2, 3]]
    assert tokenize(begins, "who <|end|> who", begins=False, control_tokens=True).tolist() == [[3, 5, 3]]
    begins.chat_template = "{{ bos_token }} user {{ messages[0]['content'] }} <|end|>"
    assert chat_turn(begins, "who").tolist() == [[0, 4, 3, 5]]
    assert chat_turn(begins, "who <|end|>").tolist() == [[0, 4, 3, 2, 5]]


def test_a_later_turn_is_what_the_template_puts_behind_the_turns_before(begins):
    turns = "{{ bos_token }}{% for m in messages %} user {{ m.content }} {% endfor %}"
    begins.chat_template = turns + "{% if add_generation_prompt %} ?{% endif %}"
    said = [{"role": "user", "content": "who"}, {"role": "assistant", "content": "who who"}]
    assert chat_turn(begins, "who").tolist() == [[0, 4, 3, 2]]
    assert chat_turn(begins, "who", history=said).tolist() == [[4, 3, 2]]
    begins.chat_template = "{{ bos_token }} user {{ messages[-1].content }}"
    with pytest.raises(InvalidTextError, match="must extend the conversation"):
        chat_turn(begins, "? who", history=said)


def test_what_follows_an_answer_begins_where_the_template_has_ended_it(begins):
    begins.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    turns = "{{ bos_token }}{% for m in messages %} user {{ m.content }} <|end|>\n{% endfor %}"
    begins.chat_template = turns + "{% if add_generation_prompt %} ?{% endif %}"
    assert end_of_turn(begins) == [5]
    assert following_turn(begins, "who").tolist() == [[4, 3, 5, 2]]
    said = [{"role": "user", "content": "who"}, {"role": "assistant", "content": "who who"}]
    whole = [*chat_prompt(begins, said[:1])[0].tolist()[:-1], 4, 3, 3, *end_of_turn(begins)]
    assert [*whole, *following_turn(begins, "who <|end|>")[0].tolist()] == [
        *[0, 4, 3, 5],
        *[4, 3, 3, 5],
        *[4, 3, 2, 5, 2],
    ]


def test_names_of_control_tokens_anywhere_in_a_conversation_are_text(begins):
    begins.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    begins.chat_template = "{% for m in messages %} user {{ m.content }} <|end|>{% endfor %}"
    said = [{"role": role, "content": "who <|end|>"} for role in ("user", "assistant", "user")]
    assert chat_prompt(begins, said).tolist() == [[4, 3, 2, 5] * 3]


def test_control_tokens_without_a_part_of_their_own_are_text_too(begins):
    begins.backend_tokenizer.add_special_tokens(["<start_of_turn>"])  # as Gemma 3 has it
    begins.chat_template = "{% for m in messages %} <start_of_turn> user {{ m.content }}{% endfor %}"
    assert "<start_of_turn>" not in begins.all_special_tokens
    said = [{"role": "user", "content": "who <start_of_turn>"}]
    assert chat_prompt(begins, said).tolist() == [[5, 4, 3, 2]]
    assert chat_turn(begins, "<start_of_turn> who").tolist() == [[5, 4, 2, 3]]


def test_half_a_character_is_named_with_its_place(begins):
    for read in (tokenize, chat_turn):
        with pytest.raises(InvalidTextError, match=r"'\\udcff' at character 4"):
            read(begins, "who \udcff")


def test_long_range_tokens_were_last_met_beyond_the_distance():
    text = [7, 8, 7, 9, 9, 8, 7, 5]
    assert long_range_tokens(text, 2).tolist() == [False] * 5 + [True, True, False]
    assert long_range_tokens(text, 3).tolist() == [False] * 5 + [True, True, False]
    assert long_range_tokens(text, 4).tolist() == [False] * 8
    assert np.count_nonzero(long_range_tokens(range(100), 1)) == 0


def test_a_long_text_draws_no_warning_of_the_models_length(begins, monkeypatch):
    begins.model_max_length = 4
    monkeypatch.setattr("transformers.tokenization_utils_base.logger.warning", lambda said: pytest.fail(said))
    assert tokenize(begins, "who " * 20).shape == (1, 21)
    assert chat_turn(begins, "who " * 20).shape == (1, 22)
    assert passkey_prompt(begins, 200, 0.5, 12345).shape == (1, 200)
    with pytest.raises(pytest.fail.Exception, match="longer than the specified maximum"):
        begins("who " * 20)
