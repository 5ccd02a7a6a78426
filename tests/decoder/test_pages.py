"""Page choice: each token attends to a few pages of the retrieved tokens."""

from __future__ import annotations

import pkgutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional

from memlong import MemoryDecoder, create_bank
from memlong.decoder.pages import attention, kernel
from memlong.decoder.pages.attention import attend_compiled, page_mask
from memlong.decoder.pages.choice import PageBudget, Sketch, choose_pages
from memlong.decoder.pages.room import GroupRoom, LayerRoom, Room
from memlong.decoder.stream.retrieval import retrieve_chunks
from memlong.decoder.stream.token_stream import TokenStream
from memlong.errors import UnsupportedModelError

TOLERANCE = {"rtol": 0.0, "atol": 1e-5}
ROWS, KV_HEADS, GROUP, QUERIES, MEMORY, LOCAL, WIDTH = 2, 3, 2, 40, 64, 50, 8
EVERYTHING = 10_000


@pytest.fixture
def states():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(ROWS, KV_HEADS * GROUP, QUERIES, WIDTH, generator=generator)
    key, value = torch.randn(2, ROWS, KV_HEADS, MEMORY + LOCAL, WIDTH, generator=generator)
    return query, key, value


@pytest.fixture
def by_masks(monkeypatch):
    """Have decoders attend through masks, as on a GPU."""
    monkeypatch.setattr("memlong.decoder.stream.batch.why_not_compiled", lambda *_: "a test")


def logits_of(model, ids, config, step=None):
    with MemoryDecoder(model, None, config) as decoder, torch.inference_mode():
        parts = ids.split(step or ids.shape[1], dim=1)
        return torch.cat([each.logits[0] for part in parts for each in decoder.stream(part)])


def room_of(keys, values, budget):
    """What a room holds for a layer, which is the only one."""
    sketch = Sketch.of(keys, budget)
    energies = sketch.scales  # not needed
    states = keys, values, sketch.keys, sketch.scales, energies, sketch.channels
    group = GroupRoom(*(each[:, None] for each in states))
    return LayerRoom(group, 0, keys.shape[2] // budget.chunk_size, keys.shape[2])


def causal(keys):
    """A mask [rows, 1, queries, keys] under which the latest keys are the queries'."""
    index = torch.arange(keys)
    return torch.where(index[-QUERIES:, None] >= index, 0.0, torch.finfo(torch.float32).min)[None, None]


def test_pages_are_those_with_the_largest_share_of_attention_by_the_sketch(states):
    query, key, _ = states
    query = query.unflatten(1, (KV_HEADS, GROUP))
    sketch = Sketch.of(key[:, :, :MEMORY], PageBudget(12, 4, 8))
    found = choose_pages(query, sketch, PageBudget(12, 4, 8)).sort().values
    for row in range(ROWS):
        for head in range(KV_HEADS):
            keys = key[row, head, :MEMORY]
            channels = keys.square().sum(0).topk(WIDTH // 2).indices
            chunks = keys.view(-1, 8, WIDTH)
            steps = chunks.abs().amax(dim=1, keepdim=True) / 127  # of eight bits
            keys = ((chunks / steps).round() * steps).view(MEMORY, WIDTH)
            for number in range(QUERIES):
                best = (query[row, head, :, number][:, channels] @ keys[:, channels].T).view(GROUP, -1, 4)
                shares = best.amax(2).softmax(1).sum(0)
                assert found[row, head, number].tolist() == shares.topk(3).indices.sort().values.tolist()


def test_pages_that_are_hidden_are_chosen_last(states):
    query, key, _ = states
    visible = torch.zeros(ROWS, QUERIES, MEMORY // 4, dtype=torch.bool)
    visible[0, :, 3:5] = True
    found = choose_pages(
        query.unflatten(1, (KV_HEADS, GROUP)),
        Sketch.of(key[:, :, :MEMORY], PageBudget(12, 4, 8)),
        PageBudget(12, 4, 8),
        visible,
    )
    assert ((found[0] == 3).any(2) & (found[0] == 4).any(2)).all()


@pytest.mark.parametrize("size", [1, 1e-3, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_sketch_errs_by_half_a_step_at_most(dtype, size):
    budget = PageBudget(12, 4, 8)
    keys = (torch.randn(2, 3, MEMORY, WIDTH) * size).to(dtype)
    keys[1, 2, 8:16] = 0
    sketch = Sketch.of(keys, budget)
    assert sketch.scales.dtype == torch.float32
    channels = sketch.channels[:, :, None].expand(-1, -1, MEMORY, -1)
    # [rows, kv_heads, chunks, kept, tokens of a chunk], as a sketch has them
    true = keys.float().gather(3, channels).view(2, 3, -1, 2, 4, WIDTH // 2).transpose(3, 5).flatten(4)
    steps = sketch.scales[..., None]
    assert ((sketch.keys.flatten(4) * steps - true).abs() <= 0.5001 * steps).all()


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 3e38])
def test_a_query_that_is_not_a_number_chooses_pages_all_the_same(number):
    budget = PageBudget(12, 4, 8)
    query = torch.full((1, 1, 2, 1, WIDTH), number)
    sketch = Sketch.of(torch.randn(1, 1, MEMORY, WIDTH), budget)
    chosen = np.full((1, 3), -1)
    some, keys = query[0, :, :, 0, : WIDTH // 2].numpy(), sketch.keys.flatten(4)[0, 0].numpy()
    with np.errstate(all="ignore"):
        kernel.choose(some, keys, sketch.scales[0, 0].numpy(), chosen, 2, WIDTH // 2, 4, 2)
    assert len({*chosen[0].tolist()} & {*range(MEMORY // 4)}) == 3


def test_exponentials_are_those_of_numpy():
    logits = np.linspace(-60, 30, 1001, dtype=np.float32)
    found, bits = logits.copy(), np.empty(len(logits), np.int32)
    largest, total = kernel.exponentiate(found, bits)
    expected = np.exp(logits.astype(np.float64) - 30)
    assert largest == 30
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-36)
    np.testing.assert_allclose(total, expected.sum(), rtol=1e-5)


def test_the_nth_largest_is_that_of_sorting():
    numbers = np.random.default_rng(0).integers(0, 50, 40).astype(np.int32)
    numbers[3:5] = 2**31 - 1, 0
    for n in (1, 2, 17, 40):
        assert kernel.nth_largest(numbers, n) == np.sort(numbers)[-n]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("queries", [1, QUERIES])
@pytest.mark.parametrize("tokens", [12, MEMORY])
@pytest.mark.parametrize("heads", [(), (0, 2)])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)]
)
def test_compiled_attention_equals_masks(
    states, monkeypatch, threads, queries, tokens, heads, gated, dtype, error
):
    """Of a model of half precision, too, which is then rounded at the end alone."""
    monkeypatch.setattr(attention, "_PER_THREAD", 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    query, key, value = (each.to(dtype).float() for each in states)
    query, budget = query[:, :, -queries:], PageBudget(tokens, 4, 8)
    gates = torch.linspace(-2, 1, KV_HEADS * GROUP) if gated else None
    memory, window = (
        [each[:, :, some] for each in (key, value)] for some in (slice(MEMORY), slice(MEMORY, None))
    )
    chosen = list(heads) or list(range(KV_HEADS))
    held = [each[:, chosen].contiguous() for each in memory]
    found, pages = attend_compiled(
        query.to(dtype),
        (window[0].to(dtype), window[1].to(dtype)),
        room_of(*held, budget),
        heads,
        budget,
        0.3,
        causal(LOCAL)[:, :, -queries:].clamp(min=-1e4).to(dtype),
        gates,
    )
    assert found.dtype == dtype
    assert (pages is None) == budget.covers(MEMORY)
    mask = causal(MEMORY + LOCAL)[:, :, -queries:].repeat(ROWS, KV_HEADS * GROUP, 1, 1)
    if gated:
        mask[..., :MEMORY] += gates[None, :, None, None]
    mask = page_mask(query, key, Sketch.of(memory[0], budget), budget, 0.3, mask)
    expected = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    alone = functional.scaled_dot_product_attention(
        query, *window, attn_mask=causal(LOCAL)[:, :, -queries:], scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    for head in range(KV_HEADS * GROUP):
        truth = expected if head // GROUP in chosen else alone
        torch.testing.assert_close(found[:, :, head].float(), truth[:, :, head], rtol=0, atol=error)


@pytest.mark.parametrize("architecture", ["Llama", "Qwen3", "GPT-NeoX"])
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("budget", [EVERYTHING, 4 * 64])
def test_a_budget_for_everything_is_full_attention(
    tiny_model, small, text, request, architecture, compiled, budget
):
    if not compiled:
        request.getfixturevalue("by_masks")
    model, ids = tiny_model(architecture), text(150)
    config = small(position_mode="original", top_k=64, attended_tokens=budget)
    with torch.no_grad():
        expected = model(ids).logits[0]
    torch.testing.assert_close(logits_of(model, ids, config), expected, **TOLERANCE)


@pytest.mark.pairwise
@pytest.mark.parametrize("heads", ["all", "0:1,1:0,3:0+1"])
@pytest.mark.parametrize("mode", ["overlaid", "compressed", "before-window", "original"])
@pytest.mark.parametrize("step", [1, None])
def test_compiled_decoders_equal_masks(llama, small, text, monkeypatch, heads, mode, step):
    """Not at one position, where pages that begin alike tie."""
    config = small(top_k=6, attended_tokens=8, retrieval_heads=heads, position_mode=mode, gate_init=-0.1)
    ids = text(120)
    compiled = logits_of(llama, ids, config, step)
    monkeypatch.setattr("memlong.decoder.stream.batch.why_not_compiled", lambda *_: "a test")
    torch.testing.assert_close(compiled, logits_of(llama, ids, config, step), **TOLERANCE)
    everything = small(top_k=6, retrieval_heads=heads, position_mode=mode, gate_init=-0.1)
    assert (compiled - logits_of(llama, ids, everything, step)).abs().max() > 1e-3


def test_a_chunk_is_written_again_only_where_its_step_changes(llama, small, text, monkeypatch):
    """At compressed positions, of which chunks of 32 tokens have steps of 4."""
    written, write = [], Room._write

    def noting(self, row, slots, *rest):
        written.append(len(slots))
        write(self, row, slots, *rest)

    monkeypatch.setattr(Room, "_write", noting)
    sizes = {"chunk_size": 32, "segment_size": 32, "local_window": 96, "position_mode": "compressed"}
    with MemoryDecoder(llama, None, small(top_k=64, attended_tokens=64, **sizes)) as decoder:
        decoder.read(text(900))
        held = len(decoder.banks[0])
    assert 1 <= written[-1] < held / 2


def test_what_is_generated_writes_no_chunk_again(llama, small, text, monkeypatch):
    config = small(top_k=64, attended_tokens=8, position_mode="original", focus_tokens=0)
    with MemoryDecoder(llama, None, config) as decoder:
        decoder.read(text(100))
        held = len(decoder.banks[0])
        written, write = [], Room._write

        def noting(self, row, slots, *rest):
            written.extend(slots)
            write(self, row, slots, *rest)

        monkeypatch.setattr(Room, "_write", noting)
        decoder.generate(text(2), max_new_tokens=24, do_sample=False)
    assert 3 <= len(written) < held / 2


@pytest.mark.parametrize("heads", ["all", "1:0,2:1,3:0+1"])
def test_token_by_token_equals_segments(llama, small, text, heads):
    config = small(top_k=6, attended_tokens=8, retrieval_heads=heads)
    ids = text(96)
    torch.testing.assert_close(logits_of(llama, ids, config, 1), logits_of(llama, ids, config), **TOLERANCE)


def test_no_choice_depends_on_a_later_token(llama, small, text):
    config, ids = small(top_k=6, attended_tokens=8), text(120)
    other = ids.clone()
    other[:, 116:] = ids[:, 116:].flip(1)
    before, after = (logits_of(llama, each, config) for each in (ids, other))
    torch.testing.assert_close(before[:116], after[:116], **TOLERANCE)
    assert not torch.allclose(before[116:], after[116:], atol=1e-3)


@pytest.mark.parametrize("compiled", [True, False])
def test_ragged_rows_are_alone(llama, small, text, request, compiled):
    if not compiled:
        request.getfixturevalue("by_masks")
    ids, lengths = text(100, rows=3), [100, 61, 13]
    mask = torch.stack([(torch.arange(100) >= 100 - length).long() for length in lengths])
    decoder = MemoryDecoder(llama, None, small(top_k=6, attended_tokens=8, retrieval_heads="0:0,2:1"))
    with decoder:
        together = list(decoder.stream(ids, mask))
        for row, length in enumerate(lengths):
            decoder.reset()
            alone = torch.cat([each.logits[0] for each in decoder.stream(ids[row : row + 1, 100 - length :])])
            mine = torch.cat([each.logits[row][each.tokens[row] >= 0] for each in together])
            torch.testing.assert_close(mine, alone, **TOLERANCE)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"store": {"host": "1MB", "dtype": "int8"}},
        {"backend_options": {"max_chunks": 10, "eviction": "lru"}},
    ],
)
def test_a_session_continues_where_it_was_saved(llama, small, text, tmp_path, settings):
    ids, config = text(180), small(top_k=6, attended_tokens=8, retrieval_heads="0:1,1:0,3:0+1", **settings)
    first = MemoryDecoder(llama, None, config)
    with first:
        list(first.stream(ids[:, :90]))
    first.save(tmp_path / "session")
    second = MemoryDecoder.load(tmp_path / "session", llama, None, config)
    found, expected = ([], [])
    for decoder, logits in ((first, expected), (second, found)):
        with decoder:
            logits += [each.logits[0] for each in decoder.stream(ids[:, 90:])]
    torch.testing.assert_close(torch.cat(found), torch.cat(expected), **TOLERANCE)


def test_beams_are_independent(llama, small, text):
    config = small(top_k=6, attended_tokens=8)
    with MemoryDecoder(llama, None, config) as decoder:
        first = decoder.generate(text(60), max_new_tokens=20, num_beams=3, do_sample=False)
        decoder.reset()
        assert torch.equal(first, decoder.generate(text(60), max_new_tokens=20, num_beams=3, do_sample=False))


def test_what_has_gradients_attends_through_masks(llama, small, text, monkeypatch):
    config, ids = small(top_k=6, attended_tokens=8, gate_init=-0.1), text(90)
    plain = logits_of(llama, ids, config)
    decoder = MemoryDecoder(llama.requires_grad_(False), None, config)
    with decoder:
        found = [segment.logits[0] for segment in decoder.stream(ids, gradients=True)]
        found[-1].logsumexp(dim=-1).sum().backward()
    torch.testing.assert_close(torch.cat(found).detach(), plain, **TOLERANCE)
    assert decoder.gates.bias.grad.abs().sum() > 0


def test_attention_that_is_not_torchs_is_refused(tiny_model, small):
    with pytest.raises(
        UnsupportedModelError, match="must be None for this LlamaForCausalLM, which attends by 'eager'"
    ):
        MemoryDecoder(tiny_model("Llama", "eager"), None, small(attended_tokens=4))


def test_what_takes_masks_is_said(llama, small, text, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "numba", None)
        with pytest.warns(
            UserWarning, match=r"saves no time: numba is missing .*pip install 'memlong\[numba\]'"
        ):
            logits_of(llama, text(60), small(attended_tokens=4))
    monkeypatch.setattr(attention, "COMPILED", (torch.float32,))
    with pytest.warns(UserWarning, match=r"saves no time: the model is torch.bfloat16, not torch.float32"):
        logits_of(llama.to(torch.bfloat16), text(60), small(attended_tokens=4))


@pytest.mark.pairwise
@pytest.mark.parametrize("step", [1, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_of_half_precision_is_as_near_to_float32_as_without_pages(
    tiny_model, small, text, dtype, step
):
    ids, whole = text(120), {"position_mode": "original", "top_k": 64}

    def error(**settings):
        config = small(**whole, **settings)
        found = logits_of(tiny_model().to(dtype), ids, config, step)
        assert found.dtype == dtype
        return (found.float() - logits_of(tiny_model(), ids, config, step)).abs().mean()

    for attended in (EVERYTHING, 4 * 64):
        assert error(attended_tokens=attended) < 1.2 * error()


def test_sessions_of_half_precision_continue_with_their_pages(llama, small, text, tmp_path):
    model, ids, config = llama.to(torch.bfloat16), text(120), small(top_k=6, attended_tokens=8)
    whole = logits_of(model, ids, config)
    with MemoryDecoder(model, None, config) as decoder:
        decoder.read(ids[:, :77])
        decoder.save(tmp_path)
    with MemoryDecoder.load(tmp_path, model, None, config) as decoder:
        found = torch.cat([each.logits[0] for each in decoder.stream(ids[:, 77:])])
    torch.testing.assert_close(found, whole[77:], rtol=0, atol=2e-2)


def test_without_a_folder_to_keep_it_in_the_kernel_is_compiled_anew(llama, small, text, monkeypatch):
    config, ids = small(attended_tokens=4), text(60)
    expected = logits_of(llama, ids, config)

    def njit(cache=False, **_):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: function

    monkeypatch.setattr(kernel, "njit", njit)
    for step, made in ((None, kernel.kernel_of), (1, kernel.joiner_of)):
        made.cache_clear()
        torch.testing.assert_close(logits_of(llama, ids, config, step), expected, **TOLERANCE)
        assert made.cache_info().currsize
        made.cache_clear()


@pytest.mark.parametrize("first", [True, False])
def test_inference_mode_may_come_and_go(llama, small, text, first):
    ids, config = text(200), small(top_k=6, attended_tokens=8)
    expected, found = logits_of(llama, ids, config), []
    with MemoryDecoder(llama, None, config) as decoder:
        for number, part in enumerate(ids.split(50, dim=1)):
            with torch.inference_mode((number % 2 == 0) == first):
                found += [each.logits[0].clone() for each in decoder.stream(part)]
    torch.testing.assert_close(torch.cat(found), expected, **TOLERANCE)


def test_only_what_is_new_is_read_from_the_bank(small):
    bank = create_bank("torch", 4)
    blocks = torch.randn(4, 1, 1, 4, 2)
    bank.add(torch.eye(4), blocks, blocks, [(start, start + 4) for start in range(0, 16, 4)])
    asked, fetch = [], bank.fetch
    bank.fetch = lambda ids, known=(): asked.append((list(ids), list(known))) or fetch(ids, known=known)
    config = small(top_k=2)
    first, before = retrieve_chunks(bank, torch.tensor([1.0, 0.9, 0, 0]), config)
    second, after = retrieve_chunks(bank, torch.tensor([0.9, 0, 0, 1.0]), config, before)
    assert asked == [([0, 1], []), ([3], [0])]
    assert (first.ids.tolist(), second.ids.tolist(), after.ids) == ([0, 1], [3, 0], (0, 3))
    assert after.blocks[0] is before.blocks[0]
    assert torch.equal(after.keys, blocks[[0, 3]].permute(1, 2, 0, 3, 4).flatten(2, 3))
    usage = bank._state.table.usage
    assert (usage.retrievals.tolist(), usage.last_used[0]) == ([2, 1, 0, 1], usage.last_used[3])


def test_a_fork_keeps_what_it_retrieved_when_the_bank_grows(small):
    bank = create_bank("torch", 4)
    blocks = torch.randn(4, 1, 1, 4, 2)
    spans = torch.tensor([(start, start + 4) for start in range(0, 16, 4)])
    bank.add(torch.eye(4)[:1], blocks[:1], blocks[:1], spans[:1])
    stream = TokenStream(small(top_k=2), bank).fork()
    stream.bank.add(torch.eye(4)[1:2], blocks[1:2], blocks[1:2], spans[1:2])
    query, plain = torch.tensor([0.5, 1.0, 0, 0]), SimpleNamespace(candidates=0)
    stream.retrieve(query, plain)
    first = stream.memory
    search = bank.search

    def search_and_grow(queries, k, *, among):  # as another thread does
        bank.add(torch.eye(4)[3:], blocks[3:], blocks[3:], spans[3:])
        return search(queries, k, among=among)

    bank.search = search_and_grow
    stream.retrieve(query, plain)
    assert all(now is before for now, before in zip(stream.memory.blocks, first.blocks, strict=True))
    stream.retrieve(torch.tensor([0, 0.5, 0, 1.0]), plain)
    assert torch.equal(stream.memory.keys, blocks[[3, 3]].permute(1, 2, 0, 3, 4).flatten(2, 3))


def test_what_leaves_the_bank_after_the_search_is_not_found(small):
    bank = create_bank("torch", 4)
    blocks = torch.randn(4, 1, 1, 4, 2)
    bank.add(torch.eye(4), blocks, blocks, [(start, start + 4) for start in range(0, 16, 4)])
    search = bank.search

    def search_and_lose(queries, k):
        found = search(queries, k)
        bank.remove([1])
        return found

    bank.search = search_and_lose
    found, memory = retrieve_chunks(bank, torch.tensor([1.0, 0.9, 0.5, 0]), small(top_k=3))
    assert (found.ids.tolist(), memory.ids) == ([0, 2], (0, 2))
    bank.remove([0, 2, 3])
    bank.search = search
    assert retrieve_chunks(bank, torch.ones(4), small(top_k=3))[1] is None


@pytest.mark.pairwise
@pytest.mark.parametrize(
    "step", ["Room._write", "Room._hold_row", "Room._follow", "sketched", "energies", "largest", "turned"]
)
@pytest.mark.parametrize("begun", [32, 88])
def test_a_failure_leaves_a_room_that_repairs_itself(llama, small, text, monkeypatch, tmp_path, step, begun):
    config, ids = small(top_k=6, attended_tokens=8), text(140)
    expected = logits_of(llama, ids, config)[begun:]
    decoder, place = MemoryDecoder(llama, None, config), f"memlong.decoder.pages.room.{step}"
    act = pkgutil.resolve_name(place.replace(".room.", ".room:"))

    def fail(*arguments):
        act(*arguments)
        raise MemoryError

    with decoder:
        decoder.read(ids[:, :begun])
        with monkeypatch.context() as patch:
            patch.setattr(place, fail)
            with pytest.raises(MemoryError):
                decoder.read(ids[:, begun : begun + 8])
    decoder.save(tmp_path / "session")
    for each in (decoder, MemoryDecoder.load(tmp_path / "session", llama, None, config)):
        with each:
            found = torch.cat([segment.logits[0] for segment in each.stream(ids[:, begun:])])
        torch.testing.assert_close(found, expected, **TOLERANCE)


def test_pages_divide_chunks():
    assert PageBudget.of(256, 128) == PageBudget(256, 16, 128)
    assert PageBudget.of(256, 24) == PageBudget(256, 8, 24)
    assert PageBudget.of(5, 7) == PageBudget(5, 1, 7)
    assert PageBudget(5, 16, 128).pages == 1
    assert PageBudget.of(None, 128) is None
