"""What a caller has made torch's default dtype and device changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from memlong import MemoryDecoder, load_model
from memlong.decoder import Passage, create_retriever
from memlong.evaluation import chat_turn, evaluate_perplexity, tokenize
from memlong.evaluation.needle import evaluate_needle
from memlong.testing import VOCABULARY
from memlong.training import RandomChunks

PASSAGES = [Passage(tuple(range(3 + start, 30 + start)), start) for start in (0, 8, 40)]
RETRIEVERS = ["lm", "random", "recent", "sentence-transformers", "hybrid"]


@contextmanager
def defaults(dtype: torch.dtype = torch.float32, device: str = "cpu") -> Iterator[None]:
    """What is made on the device meta, for want of a word where, has no numbers, and fails where they are needed."""
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


DTYPES = [pytest.param((dtype, "cpu"), id=str(dtype)) for dtype in (torch.float64, torch.bfloat16)]
OTHERS = [*DTYPES, pytest.param((torch.float16, "meta"), id="another device")]


@pytest.fixture(scope="module")
def words():
    known = {f"w{number}": number for number in range(VOCABULARY)}
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(known, unk_token="w0")))
    made.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    return made


@pytest.mark.pairwise
@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("name", RETRIEVERS)
def test_embeddings_are_the_same(llama, words, name, other):
    def embedded() -> tuple[torch.Tensor, torch.Tensor]:
        retriever = create_retriever(name, llama, words)
        return retriever.embed_chunks(PASSAGES), retriever.embed_queries(PASSAGES)

    wanted = embedded()
    with defaults(*other):
        found = embedded()
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, theirs)


@pytest.mark.pairwise
@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("name", ["lm", "random", "recent", "hybrid"])
def test_a_stream_is_the_same(llama, small, text, name, other):
    ids, question = text(120), text(6)
    options = {"retrievers": "lm,random"} if name == "hybrid" else {}

    def streamed() -> tuple[object, ...]:
        with MemoryDecoder(llama, None, small(retriever=name, retriever_options=options)) as decoder:
            logits = torch.cat([segment.logits for segment in decoder.stream(ids)], dim=1)
            scores = decoder.banks[0].exact_search(decoder.retriever.embed_queries(PASSAGES), 3).scores
            answer = decoder.generate(question, max_new_tokens=12, do_sample=False)
            return logits, scores, answer

    wanted = streamed()
    with defaults(*other):
        found = streamed()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, wanted, strict=True))


@pytest.mark.parametrize("other", DTYPES)
def test_saved_streams_go_on_the_same(llama, small, text, tmp_path, other):
    def gone_on() -> torch.Tensor:
        with MemoryDecoder(llama, None, small(gate_init=-1.0)) as decoder:
            decoder.read(text(80))
            decoder.save(tmp_path / "memory", compact=True)
        with MemoryDecoder.load(tmp_path / "memory", llama, None, small(gate_init=-1.0)) as decoder:
            return decoder.read(text(20, seed=1))

    wanted = gone_on()
    with defaults(*other):
        found = gone_on()
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("other", OTHERS)
def test_chunks_at_random_are_the_same(llama, small, text, other):
    ids = text(120)

    def read() -> torch.Tensor:
        chance = RandomChunks(0.5, torch.Generator("cpu").manual_seed(0))
        with MemoryDecoder(llama, None, small()) as decoder:
            decoder.reset(choice=chance)
            return decoder.read(ids)

    wanted = read()
    with defaults(*other):
        found = read()
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("other", DTYPES)
def test_what_is_measured_is_the_same(llama, small, text, words, other):
    ids = text(100)

    def measured() -> tuple[object, ...]:
        with MemoryDecoder(llama, words, small()) as decoder:
            found = evaluate_perplexity(decoder, ids)
            cells = evaluate_needle(decoder, [64], [0.5], filler="w5 w6 w7 w8")
        tokens = tokenize(words, "w3 w4").tolist(), chat_turn(words, "w3 w4").tolist()
        return found.token_nll.tolist(), found.recall_at_k, cells, tokens

    wanted = measured()
    with defaults(*other):
        assert measured() == wanted


@pytest.mark.parametrize("other", OTHERS)
def test_a_model_that_is_loaded_is_the_same(llama, words, tmp_path, other):
    llama.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    with defaults(*other):
        model, _ = load_model(str(tmp_path), dtype="float32", device="cpu")
    for mine, theirs in zip(model.state_dict().values(), llama.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)
    ids = torch.arange(3, 40, dtype=torch.long)[None]
    assert torch.equal(model(ids).logits, llama(ids).logits)
