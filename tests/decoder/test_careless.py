"""What users in a hurry do with a decoder: right, or refused with words that say what to do."""

from __future__ import annotations

import copy
import pickle
import signal
import threading
from contextlib import ExitStack

import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from memlong import MemoryDecoder
from memlong.errors import InvalidArgumentError, MemlongError, SnapshotError

OPTIONS = {"max_new_tokens": 8, "do_sample": False}


def test_padding_without_a_mask_is_padding_as_transformers_has_it(llama, small, text):
    short = text(14, seed=3)
    padded = torch.cat([torch.zeros(1, 6, dtype=torch.long), short], dim=1)
    expected = llama.generate(short, **OPTIONS)[:, 14:]
    assert torch.equal(llama.generate(padded, **OPTIONS)[:, 20:], expected)
    with MemoryDecoder(llama, None, small()) as decoder:
        alone = decoder.generate(short, **OPTIONS)[:, 14:]
        read = decoder.tokens_read
        decoder.reset()
        assert torch.equal(decoder.generate(padded, **OPTIONS)[:, 20:], alone)
        assert decoder.tokens_read == read
        decoder.reset()
        decoder.generate(
            padded, **OPTIONS, pad_token_id=2, eos_token_id=2
        )  # where it is no padding, it is text
        assert decoder.tokens_read[0] > read[0]


@pytest.fixture
def conversed(llama, small, text):
    with MemoryDecoder(llama, None, small()) as decoder:
        options = {**OPTIONS, "eos_token_id": None, "return_dict_in_generate": True}
        yield decoder, decoder.generate(text(10), **options), options


def test_another_conversation_than_was_read_is_refused_by_the_first_token_that_differs(conversed, text):
    decoder, first, options = conversed
    read = decoder.tokens_read
    other = torch.cat([first.sequences, text(5, seed=1)], dim=1)
    other[0, 3] = (other[0, 3] + 1) % 90 + 3
    with pytest.raises(
        InvalidArgumentError, match=f"got {int(other[0, 3])} in row 0 at column 3, where the streams"
    ):
        decoder.generate(other, past_key_values=first.past_key_values, **options)
    assert decoder.tokens_read == read


def test_less_than_was_read_is_refused_as_that(conversed):
    decoder, first, options = conversed
    with pytest.raises(
        InvalidArgumentError,
        match=r"continue the 1 rows of 18 tokens that past_key_values stands for, got \(1, 6\)",
    ):
        decoder.generate(first.sequences[:, :6], past_key_values=first.past_key_values, **options)


def test_the_models_own_generate_says_that_it_knows_no_memory(llama, small, text):
    with MemoryDecoder(llama, None, small()) as decoder:
        with pytest.warns(UserWarning, match=r"call decoder.generate\(\)"):
            llama.generate(text(9), **OPTIONS)
        decoder.generate(text(9), **OPTIONS)
    assert "generate" not in vars(llama)


def test_a_copy_of_an_attached_model_is_a_model_like_any_other(llama, small, text):
    with MemoryDecoder(llama, None, small()) as decoder:
        expected = decoder.read(text(60))
        other = copy.deepcopy(llama)
    with MemoryDecoder(other, None, small()) as decoder:
        assert torch.equal(decoder.read(text(60)), expected)
    assert other.config._attn_implementation == "sdpa"


def test_the_plain_model_in_another_thread_does_not_enter_a_memory(llama, small, text):
    ids, stop = text(150), threading.Event()

    def read():
        with torch.no_grad():
            for part in (ids[:, :60], *ids[:, 60:].split(1, dim=1)):
                decoder.read(part)
        bank = decoder.banks[0]
        return bank.fetch(bank.ids).keys

    def generate_beside():
        while not stop.is_set():
            cache = DynamicCache(config=llama.config)
            for token in ids[:, :30].split(1, dim=1):
                llama.model(token, past_key_values=cache, use_cache=True)

    with MemoryDecoder(llama, None, small()) as decoder:
        expected = read()
        beside = threading.Thread(target=torch.no_grad()(generate_beside))
        beside.start()
        try:
            for _ in range(3):
                decoder.reset()
                assert torch.equal(read(), expected)
        finally:
            stop.set()
            beside.join()


def test_attention_changed_while_a_memory_is_attached_is_refused(llama, small, text):
    with MemoryDecoder(llama, None, small()) as decoder:
        decoder.read(text(20))
        llama.set_attn_implementation("eager")
        with pytest.raises(MemlongError, match="attention implementation is 'eager': it was changed inside"):
            decoder.read(text(20))


def test_a_dtype_changed_in_the_middle_of_a_stream_is_refused(llama, small, text):
    with MemoryDecoder(llama, None, small()) as decoder:
        decoder.read(text(20))
        llama.to(torch.bfloat16)
        with pytest.raises(MemlongError, match=r"when the stream began, got torch.bfloat16 on cpu"):
            decoder.read(text(20))
        decoder.reset()
        decoder.read(text(60))


@pytest.mark.parametrize("act", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_decoder_is_saved_and_not_copied(llama, small, act):
    with pytest.raises(MemlongError, match=r"save\(path\), and continue elsewhere with MemoryDecoder.load"):
        act(MemoryDecoder(llama, None, small()))


def test_a_decoder_tells_what_it_is_and_how_far(llama, small, text):
    decoder = MemoryDecoder(llama, None, small())
    assert repr(decoder) == "MemoryDecoder(LlamaForCausalLM, backend='torch', retrieval_layers='0-3')"
    with decoder:
        decoder.read(text(60, rows=2))
    assert repr(decoder).endswith("tokens_read=(60, 60), chunks=(10, 10))")
    assert "plain window" in repr(MemoryDecoder(llama, None, small(backend=None)))


def test_a_stream_knows_how_many_segments_are_to_come(llama, small, text):
    mask = torch.ones(2, 45, dtype=torch.long)
    mask[0, :20] = 0
    with MemoryDecoder(llama, None, small()) as decoder:
        for ids, given, count in (
            (text(5, rows=2), None, 1),
            (text(45, rows=2), mask, 7),
            (text(1, rows=2), None, 1),
        ):
            stream = decoder.stream(ids, given)
            assert len(stream) == count
            assert len(list(stream)) == count
            assert len(stream) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs": torch.ones(1, 3, dtype=torch.long)}, "a prompt is given as input_ids"),
        ({"num_beams": 0, "max_new_tokens": 3}, "num_beams must be an integer of at least 1, got 0"),
        ({"max_new_tokens": "3"}, "max_new_tokens must be an integer of at least 1, got '3'"),
        ({"max_length": 50.5}, "max_length must be an integer of at least 1, got 50.5"),
        ({"min_new_tokens": "2"}, "min_new_tokens must be an integer of at least 0, got '2'"),
        ({"do_sample": "yes"}, "do_sample must be True or False, got 'yes'"),
        ({"remember": "x"}, "remember must be True or False, got 'x'"),
        ({"top_p": "0.9"}, "top_p must be a number, got '0.9'"),
        ({"max_time": [1]}, r"max_time must be a number, got \[1\]"),
        ({"num_beams": 2, "length_penalty": True}, "length_penalty must be a number, got True"),
        (
            {"streamer": "x"},
            r"streamer must have put\(\) and end\(\), as transformers' TextStreamer, got 'x'",
        ),
        ({"eos_token_id": ["a"]}, r"eos_token_id must be a token id, or a list of them, got \['a'\]"),
        ({"stopping_criteria": 5}, "stopping_criteria must be a list of callables, got 5"),
        ({"generation_config": GenerationConfig(max_new_tokens=2.0)}, "max_new_tokens must be an integer"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_read(llama, small, text, options, message):
    with MemoryDecoder(llama, None, small()) as decoder:
        with pytest.raises(ValueError, match=message):
            decoder.generate(text(9), **options)
        assert decoder.tokens_read == ()


@pytest.mark.parametrize("moment", ["while it attaches", "while it detaches", "while it is probed"])
def test_a_model_is_given_back_whenever_an_interrupt_comes(llama, small, text, monkeypatch, moment):
    llama.train()
    decoder = None if moment == "while it is probed" else MemoryDecoder(llama, None, small())
    calls, told = [], type(llama).set_attn_implementation

    def interrupted(model, name):
        calls.append(name)
        signal.raise_signal(signal.SIGINT)
        told(model, name)

    def setting(module, name, value, inner=torch.nn.Module.__setattr__):
        if name == "training" and value and not calls:  # as it gets its mode back
            calls.append(name)
            signal.raise_signal(signal.SIGINT)
        inner(module, name, value)

    def act():
        if decoder is None:
            MemoryDecoder(llama, None, small())
            return
        with decoder:
            if moment == "while it detaches":
                monkeypatch.setattr(torch.nn.Module, "__setattr__", setting)

    if moment != "while it detaches":
        monkeypatch.setattr(type(llama), "set_attn_implementation", interrupted)
    with pytest.raises(KeyboardInterrupt):
        act()
    monkeypatch.undo()
    assert calls
    assert all(module.training for module in llama.modules())
    assert llama.config._attn_implementation == "sdpa"
    assert "generate" not in vars(llama)
    with MemoryDecoder(llama, None, small()) as other:
        other.read(text(20))


@pytest.mark.parametrize("replacing", [False, True])
@pytest.mark.filterwarnings("error::UserWarning")
def test_a_copy_of_an_attached_model_generates_by_itself(llama, small, text, replacing):
    with MemoryDecoder(llama, None, small()) as decoder, ExitStack() as more:
        if replacing:
            more.enter_context(decoder.replacing_generate())
        other = copy.deepcopy(llama)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
    expected = type(other).generate(other, text(9), **OPTIONS)
    assert torch.equal(other.generate(text(9), **OPTIONS), expected)
    assert not torch.equal(expected, llama.generate(text(9), **OPTIONS))


def test_the_plain_model_in_another_thread_ends_no_turn(llama, small, text):
    with MemoryDecoder(llama, None, small()) as decoder:
        options = {**OPTIONS, "eos_token_id": None}

        class Meanwhile(StoppingCriteria):
            def __call__(self, input_ids, scores, **_):
                if input_ids.shape[1] == 12:
                    thread = threading.Thread(
                        target=lambda: type(llama).generate(llama, text(30, rows=2), **options)
                    )
                    thread.start()
                    thread.join()
                return torch.zeros(len(input_ids), dtype=torch.bool)

        decoder.generate(text(10), stopping_criteria=[Meanwhile()], **options)
        assert decoder.tokens_read == (18,)


def test_what_ends_one_row_with_beams_ends_no_other(llama, small, text):
    class OnlyRow(StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            return (input_ids[:, 0] == 7) & (input_ids.shape[1] > 12)

    ids = text(10, rows=2)
    ids[0, 0], ids[1, 0] = 7, 8
    ids[:, 1:] = ids[:1, 1:]
    with MemoryDecoder(llama, None, small()) as decoder:
        decoder.generate(ids, stopping_criteria=[OnlyRow()], **OPTIONS, num_beams=2, eos_token_id=None)
        assert decoder.tokens_read == (13, 18)


def test_a_read_that_was_refused_begins_no_stream(llama, small, text):
    decoder = MemoryDecoder(llama, None, small())
    with pytest.raises(MemlongError, match="not attached"):
        decoder.read(text(20))
    with decoder:
        decoder.read(text(20, rows=2))


def test_a_copy_or_a_plain_turn_within_a_turn_changes_neither(llama, small, text):
    made = []

    class Within(StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            if input_ids.shape[1] == 12:
                type(llama).generate(llama, text(30, rows=2), **{**OPTIONS, "max_new_tokens": 2})
                made.append(copy.deepcopy(llama))
            return torch.zeros(len(input_ids), dtype=torch.bool)

    with MemoryDecoder(llama, None, small()) as decoder:
        decoder.generate(text(10), stopping_criteria=[Within()], **OPTIONS, eos_token_id=None)
        assert decoder.tokens_read == (18,)
    (other,) = made
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
        assert torch.equal(other(text(9)).logits, type(other).forward(other, text(9)).logits)
        assert not torch.equal(other(text(9)).logits, llama(text(9)).logits)


def test_a_load_drops_no_chunk_of_a_store_of_fewer_bits(llama, small, text, tmp_path):
    limit = {"backend_options": {"max_bytes": 60_000}}
    store = {"host": "all", "dtype": "int8"}
    with MemoryDecoder(llama, None, small(**limit, store=store, retriever_options={"dim": 64})) as decoder:
        decoder.read(text(400))
        decoder.save(tmp_path)
        held = len(decoder.banks[0])
    options = small(**limit, retriever_options={"dim": 64})
    for lazy in (False, True):
        with pytest.raises(SnapshotError, match=rf"holds {held} chunks, but only"):
            MemoryDecoder.load(tmp_path, llama, None, options, lazy=lazy)
    again = MemoryDecoder.load(
        tmp_path, llama, None, small(**limit, store=store, retriever_options={"dim": 64})
    )
    assert len(again.banks[0]) == held


def test_generate_in_a_pipelines_place_takes_what_transformers_takes_by_position(llama, small, text):
    with MemoryDecoder(llama, None, small()) as decoder, decoder.replacing_generate():
        expected = decoder.generate(text(9), remember=False, **OPTIONS)
        assert torch.equal(
            llama.generate(text(9), None, LogitsProcessorList(), StoppingCriteriaList(), **OPTIONS), expected
        )
