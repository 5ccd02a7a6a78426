"""What a user in a hurry gives a decoder: taken as it is meant, or refused with what to give instead."""

from __future__ import annotations

import threading
from functools import partial

import numpy as np
import pytest
import torch

from memlong import MemoryConfig, MemoryDecoder, load_bank
from memlong.errors import InvalidArgumentError, MemlongError, UnsupportedModelError


def test_numbers_of_numpy_and_torch_are_numbers(small):
    config = small(
        chunk_size=np.int64(4), top_k=torch.tensor(3), query_tokens=np.uint8(8), gate_init=np.float32(0.5)
    )
    assert config == small(query_tokens=8, gate_init=0.5)
    assert all(type(value) in (int, str, dict, float, type(None)) for value in vars(config).values())


@pytest.mark.parametrize(
    "layers", [np.array([1, 3]), torch.tensor([1, 3]), [np.int64(3), 1], {3, 1}, range(1, 4, 2)]
)
def test_layers_of_any_kind_of_list_are_layers(small, layers):
    assert small(retrieval_layers=layers).retrieval_layers == "1,3"
    assert small(retrieval_layers=3).retrieval_layers == "3"


@pytest.mark.parametrize("layers", [[-1], [1.0], True, [], None, 1.5])
def test_what_are_no_layers_is_told_how_to_write_them(small, layers):
    with pytest.raises(InvalidArgumentError, match=r"must be 'all', layers .* or a list of numbers"):
        small(retrieval_layers=layers)


def test_options_that_are_changed_afterwards_are_not_the_configurations():
    options = {"max_chunks": 5}
    config = MemoryConfig(backend_options=options)
    options["max_chunks"] = "many"
    assert config.backend_options == {"max_chunks": 5}


@pytest.mark.parametrize("where", ["made", "loaded"])
def test_a_configuration_in_the_tokenizers_place_is_refused(llama, small, tmp_path, where):
    make = MemoryDecoder if where == "made" else partial(MemoryDecoder.load, tmp_path)
    with pytest.raises(
        InvalidArgumentError, match=r"tokenizer must be .*, got MemoryConfig.*the config comes after it"
    ):
        make(llama, small())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("Hello", r"input_ids must .* got str. .* tokenizer\(text, return_tensors='pt'\).input_ids"),
        ({"input_ids": [[3]]}, r"input_ids must .* got dict. .* \*\*encoding"),
        (torch.ones(1, 4), r"\(1, 4\) of torch.float32"),
        (np.ones((1, 4), dtype=int), "input_ids must .* got ndarray. .*torch.as_tensor"),
    ],
)
@pytest.mark.parametrize("call", ["read", "stream", "generate"])
def test_what_is_no_tensor_of_tokens_is_told_how_to_make_one(llama, small, given, message, call):
    with (
        MemoryDecoder(llama, None, small()) as decoder,
        pytest.raises(InvalidArgumentError, match=message),
    ):
        getattr(decoder, call)(given)


def test_a_mask_that_is_added_to_logits_is_no_attention_mask(llama, small, text):
    mask = torch.tensor([[float("-inf")] * 4 + [0.0] * 4])
    with (
        MemoryDecoder(llama, None, small()) as decoder,
        pytest.raises(InvalidArgumentError, match="attention_mask must be 1, and 0 where padded"),
    ):
        decoder.read(text(8), mask)


def test_load_is_not_called_on_a_decoder_that_it_would_leave_empty(llama, small, tmp_path):
    decoder = MemoryDecoder(llama, None, small())
    with pytest.raises(InvalidArgumentError, match=r"makes a new MemoryDecoder.*new = MemoryDecoder.load\("):
        decoder.load(tmp_path, llama, None, small())


@pytest.mark.parametrize("path", [None, 3, b"x", "", "a\0b"])
def test_what_is_no_path_is_refused(llama, small, path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    decoder = MemoryDecoder(llama, None, small())
    with pytest.raises(InvalidArgumentError, match="must be the path of a folder"):
        decoder.save_pretrained(path)
    with pytest.raises(InvalidArgumentError, match="must be the path of a folder"):
        MemoryDecoder.from_pretrained(path, llama, None)
    assert not list(tmp_path.iterdir())


def test_a_tilde_is_the_users_home(llama, small, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    MemoryDecoder(llama, None, small(gate_init=-1.0)).save_pretrained("~/made")
    assert (tmp_path / "made" / "memlong.json").exists()
    assert MemoryDecoder.from_pretrained("~/made", llama, None).gates is not None
    assert MemoryDecoder(llama, None, small(gates="~/made/gates.safetensors")).gates is not None


@pytest.mark.slow
def test_threads_that_read_with_one_decoder_leave_a_stream_that_was_read(llama, small, text):
    for seed in range(3):
        with MemoryDecoder(llama, None, small()) as decoder:
            ends = []

            def read(decoder=decoder, ends=ends):
                try:
                    decoder.read(text(200))
                except MemlongError as error:
                    ends.append(str(error))
                else:
                    ends.append("read")

            threads = [threading.Thread(target=read) for _ in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert sum(end == "read" or "This call of stream() has ended" in end for end in ends) == 3, ends
            assert "read" in ends
            (count,) = decoder.tokens_read
            spans = decoder.banks[0].fetch(decoder.banks[0].ids).spans
        assert count >= 200
        assert spans[:, 0].tolist() == list(range(2, 2 + 4 * len(spans), 4)), seed


def test_streams_are_saved_between_segments_whoever_reads(llama, small, text, tmp_path):
    with MemoryDecoder(llama, None, small()) as decoder:
        decoder.read(text(30))
        reader = threading.Thread(target=lambda: [decoder.read(text(100)) for _ in range(3)])
        reader.start()
        for number in range(6):
            decoder.save(tmp_path / str(number))
        reader.join()
    for number in range(6):
        with MemoryDecoder.load(tmp_path / str(number), llama, None, small()) as loaded:
            (count,), (bank,) = loaded.tokens_read, loaded.banks
            assert not len(bank) or int(bank.fetch(bank.ids).spans.max()) <= count
            loaded.read(text(9))


def test_a_retriever_of_other_tokens_is_refused(llama, tiny_model, small):
    other = tiny_model(seed=1)
    other.resize_token_embeddings(80, mean_resizing=False)
    retriever = MemoryDecoder(other, None, small()).retriever
    with pytest.raises(
        InvalidArgumentError,
        match="must be for this LlamaForCausalLM with 97 tokens, got one for a LlamaForCausalLM with 80",
    ):
        MemoryDecoder(llama, None, small(), retriever=retriever)


def test_damaged_weights_are_called_so(llama, small):
    with torch.no_grad():
        llama.model.layers[0].mlp.up_proj.weight.fill_(float("nan"))
    with pytest.raises(UnsupportedModelError, match="layer 1 are NaN or infinite"):
        MemoryDecoder(llama, None, small())


def test_a_model_that_returns_tuples_is_told_what_to_set(llama, small):
    llama.config.return_dict = False
    with pytest.raises(UnsupportedModelError, match=r"config\.return_dict is False: set it to True"):
        MemoryDecoder(llama, None, small())


@pytest.mark.parametrize("name", ["logits_processor", "stopping_criteria"])
def test_what_cannot_be_called_while_a_text_is_generated_is_refused_before(llama, small, text, name):
    with MemoryDecoder(llama, None, small()) as decoder:
        with pytest.raises(InvalidArgumentError, match=f"{name} must hold callables, got 3"):
            decoder.generate(text(9), max_new_tokens=2, **{name: [3]})
        assert decoder.tokens_read == ()


def test_a_row_of_a_snapshot_is_a_number(llama, small, text, tmp_path):
    with MemoryDecoder(llama, None, small()) as decoder:
        decoder.read(text(60, rows=2))
        decoder.save(tmp_path)
        banks = decoder.banks
    assert len(load_bank(tmp_path, row=np.int64(1))) == len(banks[1])
    for row in (True, "0", -1, 1.0):
        with pytest.raises(InvalidArgumentError, match="row must be an integer"):
            load_bank(tmp_path, row=row)


@pytest.mark.parametrize("backend", ["torch", None])
def test_a_window_without_bound_takes_no_more_room_than_a_text(llama, small, text, backend):
    with MemoryDecoder(
        llama, None, small(backend=backend, position_mode="original", local_window=10**12)
    ) as decoder:
        found = decoder.read(text(300))
    torch.testing.assert_close(found, llama(text(300)).logits[:, -1], rtol=0, atol=1e-4)
