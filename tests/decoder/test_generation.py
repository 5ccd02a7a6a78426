"""generate() with a memory: equal to the plain model's wherever the two see the same."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import (
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    pipeline,
)

from memlong import MemoryDecoder
from memlong.decoder.stream.asking import ask
from memlong.decoder.stream.retrieval import retrieve_chunks
from memlong.errors import InvalidArgumentError, MemlongError


def plain(model, ids, mask=None, new=20, **options):
    return model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, **options)


@pytest.fixture
def whole(small):
    """Memory of everything, at its true position: what full attention sees."""
    return lambda **changes: small(position_mode="original", top_k=99, retrieval_layers="0-3", **changes)


@pytest.mark.slow
@pytest.mark.pairwise
@pytest.mark.parametrize("beams", [1, 4])
def test_with_the_whole_prefix_in_memory_it_equals_full_context(
    tiny_model, architecture, attention, backend, whole, text, beams
):
    model = tiny_model(architecture, attention)
    ids = text(100)
    expected = plain(model, ids, num_beams=beams)
    with MemoryDecoder(model, None, whole(backend=backend)) as decoder:
        found = decoder.generate(ids, max_new_tokens=20, do_sample=False, num_beams=beams)
        assert len(decoder.banks[0]) > 19
    assert torch.equal(found, expected)


@pytest.mark.parametrize("tokens", range(1, 60))
def test_the_plain_window_drops_no_more_at_the_end_of_a_prompt_than_a_memorys(llama, small, text, tokens):
    first = []
    for config in (small(backend=None), small()):
        with MemoryDecoder(llama, None, config) as decoder:
            decoder.read(text(tokens))
            forks, _ = ask(decoder._streams.batch, config)
            first.append(forks.streams[0].first_token)
    assert first[0] == first[1]


@pytest.mark.parametrize("backend", [None, "torch"])
def test_how_much_of_a_prompt_is_read_again_is_each_rows_own(llama, small, text, backend):
    def prompts(rows, turn):
        lengths = [(3, 40, 8, 16, 9, 1, 120)[:: 1 if turn else -1][row] for row in rows]
        ids = text(120, rows=7, seed=turn)[list(rows)]
        mask = torch.stack([(torch.arange(120) >= 120 - length).long() for length in lengths])
        return ids[:, 120 - max(lengths) :], mask[:, 120 - max(lengths) :]

    def logits(rows):
        decoder.reset()
        options = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None}
        options |= {"return_dict_in_generate": True, "output_logits": True}
        return [decoder.generate(*prompts(rows, turn), **options).logits[0] for turn in range(2)]

    with MemoryDecoder(llama, None, small(backend=backend)) as decoder:
        together = logits(range(7))
        for row in range(7):
            for mine, theirs in zip(logits([row]), together, strict=True):
                torch.testing.assert_close(mine[0], theirs[row], rtol=0, atol=1e-4)


@pytest.mark.parametrize("beams", [1, 4])
def test_inside_the_window_it_is_the_plain_models(tiny_model, architecture, small, text, beams):
    model = tiny_model(architecture)
    ids = text(6)
    expected = plain(model, ids, new=8, num_beams=beams)
    with MemoryDecoder(model, None, small()) as decoder:
        found = decoder.generate(ids, max_new_tokens=8, do_sample=False, num_beams=beams)
        assert len(decoder.banks[0]) == 0
    assert torch.equal(found, expected)


@pytest.mark.slow
@pytest.mark.pairwise
@pytest.mark.parametrize("beams", [1, 3])
def test_a_ragged_batch_says_what_its_rows_say_alone(tiny_model, architecture, backend, small, text, beams):
    model = tiny_model(architecture)
    lengths = [90, 47, 5]
    ids = text(90, rows=3)
    mask = torch.stack([(torch.arange(90) >= 90 - length).long() for length in lengths])
    options = {"max_new_tokens": 14, "do_sample": False, "num_beams": beams, "eos_token_id": None}
    with MemoryDecoder(model, None, small(backend=backend, retrieval_layers="1-3")) as decoder:
        together = decoder.generate(ids, mask, **options)
        later = decoder.generate(text(9, rows=3, seed=1), **options)
        for row, length in enumerate(lengths):
            decoder.reset()
            alone = decoder.generate(ids[row : row + 1, 90 - length :], **options)
            assert torch.equal(alone[0, length:], together[row, 90:])
            again = decoder.generate(text(9, rows=3, seed=1)[row : row + 1], **options)
            assert torch.equal(again[0], later[row])


def test_a_prompt_in_one_call_or_in_ten_is_continued_alike(llama, small, text):
    ids = text(97)
    with MemoryDecoder(llama, None, small()) as decoder:
        expected = decoder.generate(ids, max_new_tokens=30, do_sample=False)[:, 97:]
        decoder.reset()
        for part in ids[:, :90].split(9, dim=1):
            decoder.read(part)
        found = decoder.generate(ids[:, 90:], max_new_tokens=30, do_sample=False)[:, 7:]
    assert torch.equal(found, expected)


def test_a_prompt_whose_beginning_was_streamed_is_continued_alike(tiny_model, architecture, small, text):
    ids, options = text(97), {"max_new_tokens": 12, "do_sample": False}
    with MemoryDecoder(tiny_model(architecture), None, small()) as decoder:
        expected = decoder.generate(ids, **options)[:, 97:]
        for split in (88, 93, 96):  # a whole segment of 8 tokens is left, a part, and its last token
            decoder.reset()
            for _ in decoder.stream(ids[:, :split], logits="last"):
                pass
            found = decoder.generate(ids[:, split:], **options)
            assert torch.equal(found[:, 97 - split :], expected)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}])
def test_the_stream_then_is_as_if_it_had_read_the_answer(llama, small, text, options):
    ids, question = text(60), text(11, seed=1)
    with MemoryDecoder(llama, None, small()) as decoder:
        torch.manual_seed(0)
        settings = {"max_new_tokens": 25, "do_sample": False, "eos_token_id": None} | options
        answered = decoder.generate(ids, **settings)[:1]
        found, chunks = decoder.read(question), decoder.banks[0].ids
        decoder.reset()
        decoder.read(answered)
        torch.testing.assert_close(found, decoder.read(question), rtol=0.0, atol=2e-5)
        assert torch.equal(chunks, decoder.banks[0].ids)


def test_what_a_call_does_not_remember_leaves_no_trace(llama, small, text):
    with MemoryDecoder(llama, None, small()) as decoder:
        decoder.read(text(80))
        held = decoder.banks[0].ids.tolist()
        first = decoder.generate(text(30, seed=1), max_new_tokens=30, do_sample=False, remember=False)
        second = decoder.generate(text(30, seed=1), max_new_tokens=30, do_sample=False, remember=False)
        assert torch.equal(first, second)
        assert decoder.banks[0].ids.tolist() == held
        third = decoder.generate(text(30, seed=1), max_new_tokens=30, do_sample=False)
        assert torch.equal(first, third)
        assert len(decoder.banks[0].ids) > len(held)


def test_past_key_values_carry_a_conversation_as_in_transformers(llama, small, text):
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    with MemoryDecoder(llama, None, small()) as decoder:
        first = decoder.generate(text(50), **options, return_dict_in_generate=True)
        follow = torch.cat([first.sequences, text(7, seed=1)], dim=1)
        second = decoder.generate(follow, past_key_values=first.past_key_values, **options)
        assert torch.equal(second[:, :77], follow)
        decoder.reset()
        decoder.generate(text(50), **options)
        expected = decoder.generate(text(7, seed=1), **options)
        assert torch.equal(second[:, 70:], expected)
        with pytest.raises(InvalidArgumentError, match="past_key_values is not what"):
            decoder.generate(follow, past_key_values=first.past_key_values, **options)


def test_sampling_follows_the_seed_and_the_logits_are_the_plain_models(llama, whole, text):
    options = {"max_new_tokens": 15, "do_sample": True, "top_k": 20, "temperature": 0.9}
    torch.manual_seed(3)
    expected = llama.generate(
        text(70), attention_mask=None, **options, return_dict_in_generate=True, output_logits=True
    )
    with MemoryDecoder(llama, None, whole()) as decoder:
        torch.manual_seed(3)
        found = decoder.generate(text(70), **options, return_dict_in_generate=True, output_logits=True)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=0.0, atol=2e-5)


def test_rows_that_end_early_are_continued_without_their_padding(llama, small, text):
    ids = text(60, rows=2)
    with MemoryDecoder(llama, None, small(focus_tokens=0)) as decoder:
        free = decoder.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None)[:, 60:]
        stop = next(token for token in free[0, :8].tolist() if token not in free[1, :8].tolist())
        decoder.reset()
        ended = decoder.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=stop, pad_token_id=0)
        lengths = [
            (row.tolist().index(stop) + 1) if stop in row.tolist() else len(row) for row in ended[:, 60:]
        ]
        seen = [stream.seen for stream in decoder._streams.batch.streams]
    assert lengths[0] == free[0].tolist().index(stop) + 1
    assert seen == [60 + length for length in lengths]


class Says(StoppingCriteria):
    """Ends a row that says one of some tokens, as a stop string does."""

    def __init__(self, *tokens):
        self.tokens = tokens

    def __call__(self, input_ids, scores, **_):
        return torch.isin(input_ids[:, -1], torch.tensor(self.tokens))


@pytest.mark.pairwise
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("padding", [0, 2], ids=["pad", "pad is eos"])
@pytest.mark.parametrize("eos", [2, None], ids=["eos", "no eos"])
def test_whatever_ends_a_row_the_stream_holds_what_it_said_as_alone(llama, small, text, beams, padding, eos):
    ids = text(60, rows=3)
    options = {"max_new_tokens": 20, "do_sample": False, "num_beams": beams, "eos_token_id": eos}
    options |= {"pad_token_id": padding}
    with MemoryDecoder(llama, None, small()) as decoder:
        free = decoder.generate(ids, **options)[:, 60:].tolist()
        ends = [row[4 + 3 * number] for number, row in enumerate(free[:2])]
        decoder.reset()
        decoder.generate(ids, **options, stopping_criteria=[Says(*ends)])
        held = decoder.tokens_read
        logits = decoder.read(text(5, rows=3, seed=1))
        for row in range(3):
            decoder.reset()
            decoder.generate(ids[row : row + 1], **options, stopping_criteria=[Says(*ends)])
            assert decoder.tokens_read == held[row : row + 1]
            alone = decoder.read(text(5, rows=3, seed=1)[row : row + 1])
            torch.testing.assert_close(alone[0], logits[row], rtol=0.0, atol=2e-5)
    assert min(held) < 80


def test_a_stop_string_ends_what_was_said_though_padding_is_the_end_of_text(llama, small, text):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {chr(33 + number): number for number in range(94)} | {"\u0120": 94}
    bytes_alone = Tokenizer(models.BPE(letters, []))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_alone.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_alone)
    ids = text(60, rows=2)
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": 2, "pad_token_id": 2}
    with MemoryDecoder(llama, tokenizer, small(focus_tokens=0)) as decoder:
        free = decoder.generate(ids, **options)[0, 60:].tolist()
        decoder.reset()
        ended = decoder.generate(ids, **options, tokenizer=tokenizer, stop_strings=chr(33 + free[3]))
        first = free.index(free[3]) + 1
        assert ended[0, 60:].tolist()[first:].count(2) == ended.shape[1] - 60 - first > 0
        assert decoder.tokens_read[0] == 60 + first


class After(StoppingCriteria):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **_):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


def test_nobody_is_warned_of_more_positions_than_a_memory_takes(tiny_model, small, text, monkeypatch):
    model = tiny_model()
    model.config.max_position_embeddings = 64
    monkeypatch.setattr(
        "transformers.generation.stopping_criteria.logger.warning_once", lambda said: pytest.fail(said)
    )
    with MemoryDecoder(model, None, small()) as decoder:
        assert decoder.generate(text(100), max_new_tokens=3, eos_token_id=None).shape == (1, 103)
    with pytest.raises(pytest.fail.Exception, match="maximum length"):
        model.generate(text(100), max_new_tokens=3, eos_token_id=None)


def test_streamers_and_stopping_criteria_work(llama, small, text):
    class Letters:
        def decode(self, ids, **_):
            return "".join(chr(33 + int(i)) for i in ids)

    streamer = TextIteratorStreamer(Letters(), skip_prompt=True)
    with MemoryDecoder(llama, None, small()) as decoder:
        found = decoder.generate(
            text(40),
            generation_config=GenerationConfig(max_new_tokens=50, do_sample=False),
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList([After(52)]),
        )
    assert found.shape[1] == 52
    assert "".join(streamer) == Letters().decode(found[0, 40:])


def test_memory_is_refreshed_every_so_many_tokens(llama, small, text, monkeypatch):
    with MemoryDecoder(llama, None, small(retrieve_every=3)) as decoder:
        decoder.read(text(50))
        seen = []

        def noting(*args):
            seen.append(args)
            return retrieve_chunks(*args)

        monkeypatch.setattr("memlong.decoder.stream.token_stream.retrieve_chunks", noting)
        options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "remember": False}
        decoder.generate(text(4, seed=1), **options)
    # At the end of the prompt, and after every third of the 23 tokens that go in.
    assert len(seen) == 1 + 23 // 3


def test_an_answer_that_outgrows_an_empty_bank_asks_with_its_latest_text(llama, small, text, monkeypatch):
    asked = []
    with MemoryDecoder(llama, None, small(retrieve_every=2, focus_tokens=0)) as decoder:
        embed = decoder.retriever.embed_queries
        monkeypatch.setattr(
            decoder.retriever, "embed_queries", lambda queries: (asked.extend(queries), embed(queries))[1]
        )
        decoder.generate(text(6), max_new_tokens=40, do_sample=False, eos_token_id=None)
    ends = [query.end for query in asked]
    assert len(ends) > 5
    assert min(ends) > decoder.config.local_window - decoder.config.segment_size
    assert all(query.end - query.start <= decoder.config.segment_size for query in asked)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes", [{}, {"retrieve_every": 8}, {"retrieve_every": 1}, {"segment_size": 20}, {"segment_size": 1}]
)
def test_the_window_never_grows_beyond_its_length(llama, small, text, sizes):
    widths = []
    with MemoryDecoder(llama, None, small(**sizes)) as decoder:
        handle = llama.model.rotary_emb.register_forward_pre_hook(
            lambda _, args, kwargs: widths.append(int(kwargs["position_ids"].max())), with_kwargs=True
        )
        decoder.generate(text(61), max_new_tokens=60, do_sample=False, eos_token_id=None)
        handle.remove()
    assert max(widths) < decoder.config.position_span


def test_the_pipeline_of_transformers_answers_from_memory(llama, small, text, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{number}": number for number in range(3, 97)}
    words = Tokenizer(models.WordLevel(vocabulary, "<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
    options = {"max_new_tokens": 12, "do_sample": False}
    with MemoryDecoder(llama, tokenizer, small()) as decoder, decoder.replacing_generate():
        decoder.read(text(90))
        speak = pipeline("text-generation", model=llama, tokenizer=tokenizer)
        answers = [speak("w7 w8 w9", **options)[0]["generated_text"] for _ in range(2)]
        expected = decoder.generate(torch.tensor([[7, 8, 9]]), **options)
    assert (
        answers[0] == answers[1] == "w7 w8 w9" + tokenizer.decode(expected[0, 3:], skip_special_tokens=True)
    )
    assert "generate" not in vars(llama)


@pytest.mark.parametrize("length", [3, 5])  # beyond the two sink tokens, which stand before all memory
def test_a_short_prompt_over_a_bank_that_was_given_is_answered_from_it(llama, small, text, length):
    options = {
        "max_new_tokens": 1,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    with MemoryDecoder(llama, None, small()) as decoder:
        decoder.read(text(90))
        banks = decoder.banks
        decoder.reset()
        without = decoder.generate(text(length, seed=1), **options).logits[0]
        decoder.reset(banks)
        with_memory = decoder.generate(text(length, seed=1), **options).logits[0]
    assert not torch.allclose(with_memory, without, atol=1e-3)


@pytest.mark.parametrize("remember", [True, False])
def test_what_a_turn_held_is_let_go_at_once(llama, small, text, remember):
    with MemoryDecoder(llama, None, small()) as decoder:
        decoder.read(text(90))
        bank = weakref.ref(decoder.banks[0])
        gc.collect()
        gc.disable()
        try:
            decoder.generate(text(5), max_new_tokens=8, num_beams=2, do_sample=False, remember=remember)
            decoder.reset()
            assert bank() is None
        finally:
            gc.enable()


def test_one_stream_answers_several_prompts_side_by_side(llama, small, text):
    options = {"max_new_tokens": 12, "do_sample": False, "remember": False, "eos_token_id": None}
    prompts = text(5, rows=3, seed=1)
    with MemoryDecoder(llama, None, small()) as decoder:
        decoder.read(text(90))
        together = decoder.generate(prompts, **options)
        alone = torch.cat([decoder.generate(prompt[None], **options) for prompt in prompts])
        assert len(decoder.banks) == 1
    assert torch.equal(together, alone)


@pytest.mark.parametrize(
    "bad",
    [
        {"max_new_tokens": 0},
        {"max_new_token": 3},
        {"temperature": 0.0, "do_sample": True, "max_new_tokens": 3},
    ],
)
def test_options_that_transformers_refuses_leave_the_stream_as_it_was(llama, small, text, bad):
    with MemoryDecoder(llama, None, small()) as decoder:
        decoder.read(text(40))
        with pytest.raises(ValueError, match=r"."):
            decoder.generate(text(9, seed=1), **bad)
        assert decoder.tokens_read == (40,)


def test_a_models_own_generate_comes_back(llama, small, text):
    own = llama.generate
    llama.generate = own
    with MemoryDecoder(llama, None, small()) as decoder, decoder.replacing_generate():
        with decoder.replacing_generate():
            llama.generate(text(5), GenerationConfig(max_new_tokens=2))
        assert llama.generate is not own
    assert vars(llama)["generate"] is own


def test_an_interrupted_answer_leaves_bank_and_model_as_they_were(llama, small, text):
    class Interrupt(StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            if input_ids.shape[1] > 50:
                raise KeyboardInterrupt
            return torch.zeros(len(input_ids), dtype=torch.bool)

    with MemoryDecoder(llama, None, small()) as decoder:
        decoder.read(text(80))
        held = decoder.banks[0].ids.tolist()
        with pytest.raises(KeyboardInterrupt):
            decoder.generate(
                text(30, seed=1), max_new_tokens=40, eos_token_id=None, stopping_criteria=[Interrupt()]
            )
        assert "forward" not in vars(llama)
        assert set(held) <= set(decoder.banks[0].ids.tolist())
        assert decoder.tokens_read == (110,)
        assert decoder.generate(text(5, seed=2), max_new_tokens=5, eos_token_id=None).shape == (1, 10)


def test_a_cache_that_the_model_prefers_does_not_matter(llama, small, text):
    with MemoryDecoder(llama, None, small()) as decoder:
        expected = decoder.generate(text(30), max_new_tokens=5, do_sample=False)
        llama.generation_config.cache_implementation = "static"
        decoder.reset()
        assert torch.equal(decoder.generate(text(30), max_new_tokens=5, do_sample=False), expected)


def test_what_does_not_go_with_a_memory_is_refused(llama, small, text):
    decoder = MemoryDecoder(llama, None, small())
    with pytest.raises(MemlongError, match="inside `with decoder:`"):
        decoder.generate(text(5))
    with decoder:
        with pytest.raises(
            InvalidArgumentError, match="prompt_lookup_num_tokens does not work with a memory"
        ):
            decoder.generate(text(5), prompt_lookup_num_tokens=3)
        llama.generation_config.prompt_lookup_num_tokens = 3
        with pytest.raises(
            InvalidArgumentError, match="prompt_lookup_num_tokens does not work with a memory"
        ):
            decoder.generate(text(5))
        llama.generation_config.prompt_lookup_num_tokens = None
        with pytest.raises(InvalidArgumentError, match="cache_implementation does not work"):
            decoder.generate(text(5), cache_implementation="static")
        with pytest.raises(InvalidArgumentError, match="inputs_embeds does not work"):
            decoder.generate(text(5), inputs_embeds=torch.ones(1, 5, 48))
        with pytest.raises(InvalidArgumentError, match="generation_config must be a GenerationConfig, got"):
            decoder.generate(text(5), generation_config={"max_new_tokens": 3})
        with pytest.raises(InvalidArgumentError, match=r"input_ids must be .*, got list"):
            decoder.generate([[1, 2]])
        with pytest.raises(InvalidArgumentError, match="output_attentions does not work"):
            decoder.generate(text(5), generation_config=GenerationConfig(output_attentions=True))
        with pytest.raises(InvalidArgumentError, match="padded on the left"):
            decoder.generate(text(5, rows=2), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]))
        decoder.read(text(5))
        with pytest.raises(InvalidArgumentError, match="must have 1 rows, as the streams so far, got 2"):
            decoder.generate(text(5, rows=2))


@pytest.mark.slow
def test_threads_each_with_a_model_do_not_notice_each_other(tiny_model, small, text):
    models = [tiny_model(name) for name in ("Llama", "Qwen3", "Gemma3", "GPT-NeoX")]
    options = {"max_new_tokens": 15, "do_sample": False}

    def speak(model):
        with MemoryDecoder(model, None, small()) as decoder:
            return decoder.generate(text(70), **options)

    alone = [speak(model) for model in models]
    with ThreadPoolExecutor(len(models)) as pool:
        together = list(pool.map(speak, models))
    for expected, found in zip(alone, together, strict=True):
        assert torch.equal(expected, found)


def test_two_models_with_memory_live_side_by_side(tiny_model, small, text):
    one, other = tiny_model("Llama"), tiny_model("Qwen3", seed=1)
    options = {"max_new_tokens": 10, "do_sample": False}
    alone = []
    for model in (one, other):
        with MemoryDecoder(model, None, small()) as decoder:
            alone.append(decoder.generate(text(60), **options))
    with MemoryDecoder(one, None, small()) as first, MemoryDecoder(other, None, small()) as second:
        first.read(text(60)[:, :30])
        together = [second.generate(text(60), **options)]
        together.insert(0, first.generate(text(60)[:, 30:], **options))
    assert torch.equal(together[0][:, 30:], alone[0][:, 60:])
    assert torch.equal(together[1], alone[1])


def test_text_may_be_read_without_retrieving_while_answers_retrieve(llama, small, text):
    """What is stored is then what a plain window makes of the text, and an answer attends to it."""
    plain = MemoryDecoder(llama, None, small(backend=None))
    decoder = MemoryDecoder(llama, None, small(retrieve_for="answers"))
    ids = text(90)
    with plain:
        expected = torch.cat([segment.logits for segment in plain.stream(ids)], dim=1)
        without = plain.generate(text(5, seed=2), max_new_tokens=4, do_sample=False, remember=False)
    with decoder:
        segments = list(decoder.stream(ids))
        torch.testing.assert_close(
            torch.cat([each.logits for each in segments], dim=1), expected, atol=1e-5, rtol=0
        )
        assert all(each.retrievals == (None,) for each in segments)
        stored = decoder.banks[0].fetch(decoder.banks[0].ids)
        before = int(decoder.banks[0].usage.retrievals.sum())
        answer = decoder.generate(text(5, seed=2), max_new_tokens=4, do_sample=False, remember=False)
        assert int(decoder.banks[0].usage.retrievals.sum()) > before
        decoder.score(text(5, seed=2), [text(3, seed=4)[0].tolist()])
    assert answer.shape == without.shape
    assert len(stored.ids) == len(decoder.banks[0])


def test_a_prompt_that_is_dropped_is_read_as_one_that_is_kept(llama, small, text):
    answers = []
    for remember in (True, False):
        decoder = MemoryDecoder(llama, None, small(retrieve_for="answers"))
        with decoder:
            decoder.read(text(90))
            before = int(decoder.banks[0].usage.retrievals.sum())
            said = decoder.generate(
                text(40, seed=2),
                max_new_tokens=1,
                do_sample=False,
                remember=remember,
                output_logits=True,
                return_dict_in_generate=True,
            )
            assert int(decoder.banks[0].usage.retrievals.sum()) - before <= 3  # once, for the answer
        answers.append(said.logits[0])
    torch.testing.assert_close(*answers, atol=1e-5, rtol=0)
