"""MemoryDecoder: what is stored, and what bad input is answered with."""

from __future__ import annotations

import re

import pytest
import torch

from memlong import BankPool, MemoryConfig, MemoryDecoder, Retriever, create_bank, load_bank
from memlong.errors import InvalidArgumentError, MemlongError, UnknownNameError


class Constant(Retriever):
    """Embeds everything as the same vector, of any width and value."""

    def __init__(self, width=8, value=1.0, made=None):
        super().__init__(None, None)
        self.width, self.value, self.made = width, value, made or width

    @property
    def dim(self):
        return self.width

    def embed_chunks(self, chunks):
        return torch.full((len(chunks), self.made), self.value)

    def embed_queries(self, queries):
        return self.embed_chunks(queries)


def test_every_token_is_a_sink_or_in_the_window_or_in_the_bank(llama, small, text):
    with MemoryDecoder(llama, None, small()) as decoder:
        decoder.read(text(150))
        (bank,) = decoder.banks
        found = bank.retrieve(torch.ones(1, bank.dim), len(bank))
        held = decoder._streams.batch.window.tokens[0].tolist()
    stored = [token for start, end in found.spans[0].tolist() for token in range(start, end)]
    assert sorted(held + stored) == list(range(150))
    assert held[:2] == [0, 1]
    assert len(held) - 2 <= 24


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("is_frozen", [True, False])
def test_a_frozen_head_gets_the_last_tokens_alone(llama, small, text, rows, is_frozen, monkeypatch):
    """Not a view of all tokens, for which torch copies the head's weights; the logits are the same."""
    head, seen = llama.lm_head, []
    forward = head.forward
    monkeypatch.setattr(head, "forward", lambda states: (seen.append(states.stride()), forward(states))[1])
    llama.requires_grad_(not is_frozen)
    try:
        with MemoryDecoder(llama, None, small()) as decoder:
            last = [segment.logits for segment in decoder.stream(text(40, rows=rows), logits="last")]
            decoder.reset()
            every = [segment.logits for segment in decoder.stream(text(40, rows=rows))]
    finally:
        llama.requires_grad_(True)
    width = head.in_features
    assert all(stride == (width, width, 1) for stride in seen[: len(last)]) == is_frozen
    for one, other in zip(last, every, strict=True):
        torch.testing.assert_close(one[:, -1], other[:, -1])


def test_chunks_hold_the_models_own_keys_unrotated(llama, small, text):
    ids = text(60)
    with MemoryDecoder(
        llama, None, small(position_mode="original", top_k=99, retrieval_layers="0")
    ) as decoder:
        decoder.read(ids)
        found = decoder.banks[0].retrieve(torch.ones(1, decoder.banks[0].dim), 1)
    start, end = found.spans[0, 0].tolist()
    layer = llama.model.layers[0]
    with torch.no_grad():
        hidden = layer.input_layernorm(llama.model.embed_tokens(ids[:, start:end]))
        keys = layer.self_attn.k_proj(hidden).view(4, 2, 12).transpose(0, 1)
        values = layer.self_attn.v_proj(hidden).view(4, 2, 12).transpose(0, 1)
    torch.testing.assert_close(found.keys[0, 0, 0], keys, rtol=0.0, atol=1e-5)
    torch.testing.assert_close(found.values[0, 0, 0], values, rtol=0.0, atol=1e-5)


def test_a_capacity_holds_and_streaming_goes_on(llama, small, text):
    options = {"max_chunks": 5, "eviction": "retrieval_frequency"}
    with MemoryDecoder(llama, None, small(backend_options=options)) as decoder:
        for _ in decoder.stream(text(300)):
            assert all(len(bank) <= 5 for bank in decoder.banks)


def test_reset_begins_with_empty_banks(llama, small, text):
    with MemoryDecoder(llama, None, small()) as decoder:
        first = decoder.read(text(100))
        decoder.reset()
        assert decoder.banks == ()
        assert torch.equal(decoder.read(text(100)), first)


def test_a_bank_that_already_remembers_can_be_given(llama, small, text):
    with MemoryDecoder(llama, None, small()) as decoder:
        decoder.read(text(100))
        banks = decoder.banks
        stored = len(banks[0])
        decoder.reset(banks)
        first, second, _ = decoder.stream(text(20, seed=1))
        assert first.retrievals[0] is None, "there is no text yet to make a query of"
        assert second.retrievals[0] is not None
        assert len(banks[0]) == stored


def test_the_bank_can_be_exchanged_in_mid_stream(llama, small, text):
    with MemoryDecoder(llama, None, small()) as decoder:
        decoder.read(text(100, seed=1))
        other = decoder.banks
        decoder.reset()
        decoder.read(text(80))
        held = len(other[0])
        decoder.use_banks(other)
        assert decoder.banks == other
        decoder.read(text(16, seed=2))
        assert len(other[0]) == held + 4
        with pytest.raises(InvalidArgumentError, match="each of the 1 rows that stream, got 2 banks"):
            decoder.use_banks([other[0], create_bank("torch", other[0].dim)])


def test_what_attention_works_on_is_bounded(llama, small, text):
    with MemoryDecoder(llama, None, small()) as decoder:
        assert decoder.device_kv_bytes == 0
        most = [decoder.device_kv_bytes for _ in decoder.stream(text(400))]
    a_token = 4 * 2 * 12 * 4  # layers, heads, width, bytes
    assert max(most) == most[-1] <= a_token * (3 * (2 + 24) + 2 * 12)


def test_an_interrupted_forward_leaves_the_stream_as_it_was(llama, small, text):
    ids = text(120)
    with MemoryDecoder(llama, None, small()) as decoder:
        expected = decoder.read(ids)
        decoder.reset()
        decoder.read(ids[:, :80])

        def interrupt(*_):
            raise KeyboardInterrupt

        handle = llama.model.layers[2].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            decoder.read(ids[:, 80:])
        handle.remove()
        torch.testing.assert_close(decoder.read(ids[:, 80:]), expected, rtol=0.0, atol=2e-5)


def test_a_failure_between_segments_is_made_good_by_going_on(llama, small, text, monkeypatch):
    ids = text(120, rows=2)
    with MemoryDecoder(llama, None, small()) as decoder:
        expected = decoder.read(ids)
        decoder.reset()
        decoder.read(ids[:, :80])
        first, second = decoder.banks

        def fail(*_, **__):
            raise OSError("the bank's server is gone")

        monkeypatch.setattr(second, "add", fail)
        held = len(first)
        with pytest.raises(OSError, match="server is gone"):
            decoder.read(ids[:, 80:])
        assert len(first) > held == len(second)
        monkeypatch.undo()
        torch.testing.assert_close(decoder.read(ids[:, 80:]), expected, rtol=0.0, atol=2e-5)


def test_what_the_bank_forgets_is_attended_to_no_more(llama, small, text):
    ids = text(120)
    with MemoryDecoder(llama, None, small()) as decoder:
        *_, last = decoder.stream(ids[:, :96])
        assert last.retrievals[0] is not None
        decoder.banks[0].reset()
        (segment,) = decoder.stream(ids[:, 96:104])
        kept = set(decoder.banks[0].ids.tolist())
    assert kept, "two chunks have left the window since"
    assert set(segment.retrievals[0].ids.tolist()) == kept


def test_streaming_detached_says_how_to_attach(llama, small, text):
    decoder = MemoryDecoder(llama, None, small())
    with pytest.raises(MemlongError, match="inside `with decoder:`"):
        decoder.read(text(20))


def test_wrong_tensors_are_named(llama, small, text):
    with MemoryDecoder(llama, None, small()) as decoder:
        with pytest.raises(
            InvalidArgumentError, match=r"input_ids must be .*, got \(5,\) of torch.int64.*input_ids\[None\]"
        ):
            decoder.stream(torch.arange(5))
        with pytest.raises(InvalidArgumentError, match=r"input_ids must be .*, got list.*torch\.as_tensor"):
            decoder.stream([[1, 2]])
        with pytest.raises(InvalidArgumentError, match="input_ids must have at least one row"):
            decoder.read(torch.ones(0, 3, dtype=torch.long))
        with pytest.raises(InvalidArgumentError, match="must be an integer tensor"):
            decoder.read(torch.ones(1, 3, dtype=torch.bool))
        with pytest.raises(InvalidArgumentError, match=r"logits must be .*, got 'first'"):
            decoder.stream(text(5), logits="first")
        with pytest.raises(InvalidArgumentError, match=r"attention_mask must be .*, got \(1, 4\)"):
            decoder.stream(text(5), torch.ones(1, 4))
        with pytest.raises(InvalidArgumentError, match=r"attention_mask must be .*, got ndarray"):
            decoder.stream(text(5), torch.ones(1, 5).numpy())
        with pytest.raises(InvalidArgumentError, match="at least one token in every row"):
            decoder.read(torch.ones(1, 0, dtype=torch.long))
        with pytest.raises(InvalidArgumentError, match="at least one token in every row"):
            decoder.read(text(5, rows=2), torch.tensor([[1] * 5, [0] * 5]))
        with pytest.raises(InvalidArgumentError, match=r"input_ids must be from 0 to 96, .*, got -100"):
            decoder.read(torch.tensor([[5, -100]]))
        with pytest.raises(InvalidArgumentError, match=r"input_ids must be .*, got 97"):
            decoder.read(torch.tensor([[5, 97]]))
        decoder.reset()
        decoder.read(text(20, rows=2))
        with pytest.raises(InvalidArgumentError, match="must have 2 rows, as the streams so far, got 3"):
            decoder.read(text(20, rows=3))


def test_what_is_no_configuration_or_retriever_is_refused(llama, small):
    with pytest.raises(InvalidArgumentError, match=r"config must be a MemoryConfig, got \{\}"):
        MemoryDecoder(llama, None, {})
    with pytest.raises(InvalidArgumentError, match="retriever must be a Retriever, got 'lm'"):
        MemoryDecoder(llama, None, small(), retriever="lm")
    with pytest.raises(InvalidArgumentError, match="tokenizer must be the model's, as the retriever"):
        MemoryDecoder(llama, None, small(retriever="sentence-transformers"))
    with pytest.raises(InvalidArgumentError, match="where they are the same memory"):
        MemoryDecoder(llama, None, small(store={"device": "1MB", "host": "1MB"}))


def test_an_unknown_backend_is_answered_with_what_was_meant(llama, small):
    with pytest.raises(UnknownNameError, match=r"no backend 'fais'.*[Dd]id you mean 'faiss'"):
        MemoryDecoder(llama, None, small(backend="fais"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"store": {"host": "1KB", "disk": "."}}, "host must be at least .* bytes, .*got 1000"),
        ({"backend_options": {"max_bytes": 1}}, "max_bytes is 1, but one chunk takes"),
        ({"backend_options": {"eviction": "x"}}, "no eviction policy 'x'"),
        ({"backend_options": {"dim": 1}}, "backend_options must not hold dim, which the decoder sets itself"),
    ],
)
def test_a_memory_that_can_never_hold_a_chunk_is_refused_at_once(llama, small, settings, message):
    with pytest.raises(MemlongError, match=message):
        MemoryDecoder(llama, None, small(**settings))


def test_an_unknown_retriever_is_answered_with_what_was_meant(llama, small):
    with pytest.raises(UnknownNameError, match=r"no retriever 'randon'.*[Dd]id you mean 'random'"):
        MemoryDecoder(llama, None, small(retriever="randon"))


def test_a_retriever_whose_width_differs_from_the_banks_is_refused(llama, small):
    bank = create_bank("torch", 7)
    decoder = MemoryDecoder(llama, None, small(), retriever=Constant(8))
    with pytest.raises(InvalidArgumentError, match=r"dim 8 .* Constant embeds, got a bank of dim 7"):
        decoder.reset([bank])


@pytest.mark.parametrize("change", [{"chunk_size": 8}, {"retrieval_layers": "0-1"}])
def test_a_bank_of_other_blocks_is_refused(llama, small, text, change):
    with MemoryDecoder(llama, None, small()) as decoder:
        decoder.read(text(100))
        banks = decoder.banks
    other = MemoryDecoder(llama, None, small(**change))
    with pytest.raises(
        InvalidArgumentError, match=r"this decoder's, got a bank with blocks of shape \(4, 2, 4, 12\)"
    ):
        other.reset(banks)


def test_a_bank_of_another_dtype_is_refused(llama, small, text):
    with MemoryDecoder(llama, None, small()) as decoder:
        decoder.read(text(100))
        banks = decoder.banks
    other = MemoryDecoder(llama.bfloat16(), None, small())
    with pytest.raises(
        InvalidArgumentError, match=r"of dtype torch.bfloat16, .* with blocks of dtype torch.float32"
    ):
        other.reset(banks)


@pytest.mark.parametrize("saved", [False, True], ids=["at hand", "saved"])
@pytest.mark.parametrize(
    ("seed", "change", "odd"),
    [
        (1, {}, "weights"),
        (0, {"retriever_options": {"sharpness": 2.0}}, "retriever"),
        (0, {"retrieval_layers": "0,1,2,3"}, None),
        (0, {"position_mode": "original", "top_k": 2, "local_window": 60}, None),
    ],
)
def test_a_bank_that_another_model_filled_is_refused(
    tiny_model, small, text, tmp_path, seed, change, odd, saved
):
    with MemoryDecoder(tiny_model("Llama"), None, small()) as decoder:
        decoder.read(text(100))
        banks = decoder.banks
    if saved:
        banks[0].save(tmp_path / "bank")
        banks = [load_bank(tmp_path / "bank")]
    with MemoryDecoder(tiny_model("Llama", seed=seed), None, small(**change)) as other:
        if odd is None:
            other.reset(banks)
            other.read(text(100))
            other.use_banks(banks)
            return
        with pytest.raises(
            InvalidArgumentError, match=f"another model filled.*what differs: {odd}.*any_model=True"
        ):
            other.reset(banks)
        other.reset(banks, any_model=True)
        other.read(text(9))
        with pytest.raises(InvalidArgumentError, match="another model filled"):
            other.use_banks(banks)
        other.use_banks(banks, any_model=True)


@pytest.mark.parametrize("read", [0, 1, 5, 24, 101, 240])
def test_flush_stores_what_the_window_holds(llama, small, text, read):
    ids, later = text(240, rows=2)[:, :read], text(400, rows=2, seed=1)
    mask = torch.ones_like(ids)
    mask[1, : read // 2] = 0
    with MemoryDecoder(llama, None, small()) as decoder:
        if read > 1:
            decoder.read(ids, mask)
        banks = decoder.banks
        stored, unstored = list(map(len, banks)), [bank.unstored for bank in banks]
        left = decoder.flush()
        for row, bank in enumerate(banks):
            said = ids[row, int(mask[row].argmax()) :].tolist()
            whole = max(0, len(said) - 2) // 4 * 4  # without sinks, in chunks
            assert unstored[row] + 4 * stored[row] == max(0, len(said) - 2)
            assert left[row] == said[2 + whole :]
            assert bank.spans_of(bank.ids).tolist() == [[2 + at, 6 + at] for at in range(0, whole, 4)]
            assert not bank.unstored
        if read > 5:
            decoder.read(later[:, :20])
            assert decoder.banks == banks
            assert decoder.tokens_read == (20, 20)
            decoder.reset()
            decoder.read(torch.cat([ids, later], dim=1), torch.cat([mask, torch.ones_like(later)], dim=1))
            for bank, whole in zip(banks, decoder.banks, strict=True):  # as if they had left by and by
                same = bank.ids[bank.ids < len(bank)]
                expected, found = whole.fetch(same), bank.fetch(same)
                torch.testing.assert_close(found.keys, expected.keys, rtol=0.0, atol=1e-5)
                torch.testing.assert_close(found.values, expected.values, rtol=0.0, atol=1e-5)
                assert torch.equal(found.spans, expected.spans)


def test_flush_without_a_bank_is_refused(llama, small, text):
    with MemoryDecoder(llama, None, small(backend=None)) as decoder:
        decoder.read(text(50))
        with pytest.raises(MemlongError, match="no bank to store the window in"):
            decoder.flush()


def read_in(decoder, pool, ids):
    with pool.session("a") as bank:
        decoder.reset([bank])
        decoder.read(ids)


def test_a_pool_tells_of_a_window_that_it_would_lose(llama, small, text, tmp_path):
    with MemoryDecoder(llama, None, small()) as decoder:
        dim, metric = decoder.retriever.dim, decoder.retriever.metric
        pool = BankPool(
            tmp_path / "pool", lambda: create_bank("torch", dim, metric=metric), load_bank, budget="1GB"
        )
        with pytest.warns(RuntimeWarning, match=r"holds 18 tokens in its window .* decoder.flush\(\) before"):
            read_in(decoder, pool, text(20))
        with pool.session("b") as bank:
            decoder.reset([bank])
            decoder.read(text(20))
            assert len(decoder.flush()[0]) == 2
            assert len(bank) == 4
        with pool.session("b") as bank:
            decoder.reset([bank])
            decoder.generate(text(20), max_new_tokens=2, do_sample=False, remember=False)
        pool.close()


def test_a_bank_that_is_used_again_is_of_whoever_fills_it(tiny_model, small, text):
    bank = None
    for seed in (0, 1):
        with MemoryDecoder(tiny_model("Llama", seed=seed), None, small()) as decoder:
            if bank is None:
                bank = create_bank("torch", decoder.retriever.dim, metric=decoder.retriever.metric)
            decoder.reset([bank])
            assert decoder.banks == (bank,)
            decoder.read(text(60))
            origin = bank.origin
            if seed == 0:
                bank.reset()
    with MemoryDecoder(tiny_model("Llama"), None, small()) as decoder:
        with pytest.raises(InvalidArgumentError, match="what differs: weights"):
            decoder.reset([bank])
        bank.remove(bank.ids)
        decoder.reset([bank])
        decoder.read(text(60))
    assert bank.origin != origin


def test_two_models_do_not_mix_in_a_bank_that_was_empty_when_both_got_it(tiny_model, small, text):
    decoders = [MemoryDecoder(tiny_model("Llama", seed=seed), None, small()) for seed in (0, 0, 1)]
    bank = create_bank("torch", decoders[0].retriever.dim, metric=decoders[0].retriever.metric)
    for decoder in decoders:
        decoder.reset([bank])
    for decoder in decoders[:2]:  # of one model
        with decoder:
            decoder.read(text(60))
    held = len(bank)
    with decoders[2] as other, pytest.raises(InvalidArgumentError, match="what differs: weights"):
        other.read(text(60))
    assert len(bank) == held > 10
    bank.remove(bank.ids)
    with decoders[2] as other:
        other.read(text(60))
    with decoders[0] as first, pytest.raises(InvalidArgumentError, match="what differs: weights"):
        first.read(text(60))  # in the middle of its stream


def test_a_bank_that_others_filled_by_hand_says_nothing_of_a_model(llama, small, text):
    with MemoryDecoder(llama, None, small()) as decoder:
        decoder.read(text(100))
        chunks = decoder.banks[0].fetch(decoder.banks[0].ids[:3])
        bank = create_bank("torch", decoder.banks[0].dim, metric=decoder.banks[0].metric)
        bank.add(decoder.banks[0].embeddings.embeddings[:3], chunks.keys, chunks.values, chunks.spans)
        decoder.reset([bank])
        decoder.read(text(100))
        assert bank.origin is None


@pytest.mark.parametrize("banks", [None, 5, "ab", [], [None]])
def test_what_is_no_bank_is_refused(llama, small, banks):
    decoder = MemoryDecoder(llama, None, small())
    if banks is not None:
        with pytest.raises(InvalidArgumentError, match=r"banks must (be|hold) .*, got"):
            decoder.reset(banks)
    with pytest.raises(InvalidArgumentError, match=r"banks must (be|hold) .*, got"):
        decoder.use_banks(banks)


def test_a_bank_without_a_backend_is_refused(llama, small):
    decoder = MemoryDecoder(llama, None, small(backend=None), retriever=Constant(8))
    with pytest.raises(InvalidArgumentError, match="backend=None: name one"):
        decoder.reset([create_bank("torch", 8)])


def test_a_reset_ends_the_calls_that_are_under_way(llama, small, text):
    with MemoryDecoder(llama, None, small()) as decoder:
        segments = decoder.stream(text(60))
        next(segments)
        decoder.reset()
        with pytest.raises(MemlongError, match="This call of stream\\(\\) has ended"):
            next(segments)
        for later in (
            lambda: decoder.generate(text(9), max_new_tokens=2, do_sample=False),
            lambda: decoder.read(text(9)),
        ):
            segments = decoder.stream(text(60))
            next(segments)
            later()
            with pytest.raises(MemlongError, match="This call of stream\\(\\) has ended"):
                next(segments)


def test_attached_the_model_is_in_evaluation_mode(llama, small, text):
    llama.train()
    with MemoryDecoder(llama, None, small()) as decoder:
        assert not llama.training
        decoder.read(text(50))
    assert llama.training


@pytest.mark.parametrize(
    ("layers", "local_window", "mode"),
    [("all", 40, "zero"), ("1-3", 60, "zero"), ("all", 29, "before-window"), ("all", 37, "overlaid")],
)
def test_a_sliding_window_that_would_hide_memory_is_refused(tiny_model, small, layers, local_window, mode):
    settings = small(retrieval_layers=layers, local_window=local_window, position_mode=mode)
    with pytest.raises(
        InvalidArgumentError, match=rf"local_window must be .*, got {local_window}: .* sliding window of 40"
    ):
        MemoryDecoder(tiny_model("Mistral-sliding"), None, settings)


@pytest.mark.parametrize(("local_window", "mode"), [(39, "zero"), (28, "before-window"), (36, "overlaid")])
def test_a_sliding_window_that_reaches_over_all_of_the_memory_is_taken(tiny_model, small, local_window, mode):
    settings = small(local_window=local_window, position_mode=mode)
    assert MemoryDecoder(tiny_model("Mistral-sliding"), None, settings).retrieval_layers == (0, 1, 2, 3)


def test_the_window_that_is_advised_for_compressed_positions_is_taken(tiny_model, small):
    settings = {"position_mode": "compressed", "segment_size": 4}
    with pytest.raises(
        InvalidArgumentError, match=r"at most \d+, got 40: .* sliding window of 40"
    ) as refused:
        MemoryDecoder(tiny_model("Mistral-sliding"), None, small(local_window=40, **settings))
    advised = int(re.search(r"at most (\d+)", str(refused.value))[1])
    MemoryDecoder(tiny_model("Mistral-sliding"), None, small(local_window=advised, **settings))
    with pytest.raises(InvalidArgumentError):
        MemoryDecoder(tiny_model("Mistral-sliding"), None, small(local_window=advised + 1, **settings))


@pytest.mark.parametrize(
    ("mode", "advice"),
    [
        ("zero", "local_window$"),
        ("overlaid", "local_window, or chunk_size, or use position_mode='zero'"),
        ("compressed", "local_window, or use position_mode='zero'"),
        ("before-window", "local_window, or top_k and chunk_size, or use position_mode='zero'"),
    ],
)
def test_too_few_positions_are_named_with_what_counts_in_that_mode(llama, small, mode, advice):
    with pytest.raises(InvalidArgumentError, match=f"Lower {advice}"):
        MemoryDecoder(llama, None, small(position_mode=mode, local_window=10**6))


def test_rows_cannot_share_a_bank(llama, small):
    bank = create_bank("torch", 8)
    decoder = MemoryDecoder(llama, None, small(), retriever=Constant(8))
    with pytest.raises(InvalidArgumentError, match="one bank twice"):
        decoder.reset([bank, bank])


@pytest.mark.parametrize(
    ("retriever", "message"),
    [
        (Constant(8, float("nan")), r"must be finite, got nan at"),
        (Constant(8, made=5), r"embeddings.*(\[n, 8\]|8)"),
    ],
)
def test_what_a_broken_retriever_makes_is_refused_and_nothing_is_stored(
    llama, small, text, retriever, message
):
    with MemoryDecoder(llama, None, small(), retriever=retriever) as decoder:
        with pytest.raises(InvalidArgumentError, match=message):
            decoder.read(text(100))
        assert len(decoder.banks[0]) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 0}, "top_k must be an integer of at least 1, got 0"),
        ({"chunk_size": True}, "chunk_size must be an integer of at least 1, got True"),
        ({"segment_size": 2.5}, "segment_size must be an integer of at least 1, got 2.5"),
        ({"local_window": 300}, "local_window must be at least 384, to hold a segment"),
        ({"position_mode": "nowhere"}, "position_mode must be one of 'zero', .*, got 'nowhere'"),
        ({"kv_source": "other"}, "kv_source must be one of 'layer', 'shared', 'latent', got 'other'"),
        ({"backend": 5}, "backend must be text, or None, got 5"),
        ({"retriever": None}, "retriever must be text, got None"),
        ({"retrieval_layers": [0.5]}, r"retrieval_layers must be 'all'.* list .*, got \[0\.5\]"),
        ({"retrieval_layers": range(10**9)}, r"retrieval_layers must be 'all'.*, got range\(0, 1000000000\)"),
        ({"store": "disk"}, "store must be a mapping from option to value, got a str"),
        ({"backend_options": "key=secret"}, "backend_options must be a mapping .*, got a str"),
        ({"gate_init": 1e308}, r"gate_init must be a number from -10000 to 10000, or None, got 1e\+308"),
        ({"gate_init": float("nan")}, "gate_init must be a number .*, got nan"),
        ({"memory_layer": -1}, "memory_layer must be an integer of at least 0, or None, got -1"),
        ({"memory_layer": 1}, "memory_layer must be None unless kv_source is 'shared', got 1 with 'layer'"),
        ({"segment_size": 8, "retrieve_every": 9}, r"retrieve_every must be at most segment_size \(8\)"),
    ],
)
def test_settings_that_cannot_work_are_named(settings, message):
    with pytest.raises(InvalidArgumentError, match=message):
        MemoryConfig(**settings)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("4", "must be among 0-3, the layers of this model"),
        ("a-b", "neither a layer nor a range"),
        ("3-1", "ranges must ascend"),
    ],
)
def test_layers_that_do_not_exist_are_named(llama, small, layers, message):
    with pytest.raises(InvalidArgumentError, match=message):
        MemoryDecoder(llama, None, small(retrieval_layers=layers))


def test_layers_and_ranges_are_understood(llama, small):
    assert MemoryDecoder(llama, None, small(retrieval_layers="3, 0-1")).retrieval_layers == (0, 1, 3)
    assert MemoryDecoder(llama, None, small(retrieval_layers=[3, 0, 1])).retrieval_layers == (0, 1, 3)


def test_a_stream_that_was_not_begun_ends_with_a_reset(llama, small, text):
    with MemoryDecoder(llama, None, small()) as decoder:
        segments = decoder.stream(text(40))
        decoder.reset()
        with pytest.raises(MemlongError, match=r"stream\(\) has ended"):
            next(segments)
