"""sources(): which retrieved chunks tokens attended to, and how much."""

from __future__ import annotations

import sys
from contextlib import ExitStack

import pytest
import torch
import transformers

from memlong import MemoryDecoder, create_bank
from memlong.architectures import Architecture, tiny_model_of
from memlong.decoder.model import kernels
from memlong.errors import (
    InvalidArgumentError,
    MemlongError,
    MissingDependencyError,
    StorageError,
    UnsupportedModelError,
)
from memlong.training import fit_latent_maps
from tests.decoder.test_kinds import KINDS

CLOSE = {"rel": 0.0, "abs": 1e-5}
MORE_KINDS = {
    **KINDS,
    "capped logits": ("gemma2", "Gemma2ForCausalLM"),
    "sinks of attention": ("gpt_oss", "GptOssForCausalLM"),
}


def weights_of(decoder, ids):
    """By retrieval layer, weights [heads, tokens, tokens] of the model alone, by its eager attention.

    The heads are those of all modules that read the layer's K-V.
    """
    model, found, calls = decoder.model, {}, {}

    def note(module, _, output):
        layers = decoder.model_layout.readers[module]
        layer = layers[calls.get(module, 0) % len(layers)]
        calls[module] = calls.get(module, 0) + 1
        found.setdefault(layer, []).append(output[1][0])

    before = model.config.get_text_config(decoder=True)._attn_implementation
    model.set_attn_implementation("eager")
    hooks = [module.register_forward_hook(note) for module in decoder.model_layout.modules]
    try:
        with torch.no_grad():
            model(ids)
    finally:
        model.set_attn_implementation(before)
        for hook in hooks:
            hook.remove()
    return {layer: torch.cat(found[layer]) for layer in decoder.retrieval_layers}


def by_span(sources, row=0):
    return {each.span: each for each in sources.chunks if each.row == row}


def agree(sources, expected, layers, row=0):
    """Whether the sources of a row are these: by span, the mass of each layer."""
    found = by_span(sources, row)
    assert {*found} == {*expected}
    for span, masses in expected.items():
        assert [*found[span].by_layer] == list(layers)
        assert [*found[span].by_layer.values()] == pytest.approx(masses, **CLOSE)
        assert found[span].mass == pytest.approx(sum(masses) / len(masses), **CLOSE)


def of_segments(decoder, weights, segments):
    """By span, masses [layers] of chunks that the tokens of these segments retrieved, when these see everything."""
    given, count, held = {}, 0, []
    for segment in segments:
        tokens = segment.tokens[0]
        count += len(tokens)
        if segment.retrievals[0] is not None:
            held = decoder.banks[0].spans_of(segment.retrievals[0].ids).tolist()
        for start, end in held:
            mine = [each[:, tokens, start:end].sum(dim=(1, 2)).mean() for each in weights.values()]
            given[start, end] = given.get((start, end), 0) + torch.stack(mine)
    return {span: (mine / count).tolist() for span, mine in given.items()}


# Masses are those of eager attention over the whole text.


@pytest.mark.parametrize("step", [None, 5])
def test_they_are_the_weights_of_full_attention(tiny_model, architecture, attention, small, text, step):
    model, ids = tiny_model(architecture, attention), text(120)
    config = small(position_mode="original", top_k=64, retrieval_layers="0-3")
    with MemoryDecoder(model, None, config) as decoder, decoder.sources() as sources:
        segments = [each for part in ids.split(step or 120, dim=1) for each in decoder.stream(part)]
        expected = of_segments(decoder, weights_of(decoder, ids), segments)
    assert len(expected) > 20
    agree(sources, expected, range(4))
    ids_of = {span: each.id for span, each in by_span(sources).items()}
    assert [list(span) for span in ids_of] == decoder.banks[0].spans_of(list(ids_of.values())).tolist()
    masses = [each.mass for each in sources.chunks]
    assert masses == sorted(masses, reverse=True)
    assert masses[0] > masses[-1] > 0


@pytest.mark.parametrize("kind", MORE_KINDS)
def test_of_other_kinds_of_attention_too(small, text, kind):
    model_type, class_name = MORE_KINDS[kind]
    if not hasattr(transformers, class_name):
        pytest.skip(f"this release of transformers has no {model_type}")
    model, ids = tiny_model_of(Architecture(model_type, class_name)), text(100)
    with MemoryDecoder(model, None, small(position_mode="original", top_k=64)) as decoder:
        with decoder.sources() as sources:
            segments = list(decoder.stream(ids))
        layers = decoder.retrieval_layers
        weights = weights_of(decoder, ids)
        expected = of_segments(decoder, weights, segments)
    agree(sources, expected, layers)


# Masses are the softmax of what attention was given.


def recorded(model, config, ids, mask=None, **options):
    with MemoryDecoder(model, None, config) as decoder, decoder.sources() as sources:
        list(decoder.stream(ids, mask, **options))
    return {(each.row, each.id, each.span): [*each.by_layer.values()] for each in sources.chunks}


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, masses in expected.items():
        assert found[name] == pytest.approx(masses, **CLOSE)


@pytest.mark.parametrize(
    "settings",
    [
        {"gate_init": -1.0},
        {"kv_source": "shared"},
        {"kv_source": "latent", "retrieval_layers": "2-3"},
        {"retrieval_heads": "0:1,1:0,3:0+1", "gate_init": 0.5},
        *(
            {"position_mode": mode}
            for mode in ("zero", "overlaid", "compressed", "before-window", "original")
        ),
    ],
    ids=lambda settings: ",".join(map(str, settings.values())),
)
def test_torchs_attention_and_eager_attention_agree(tiny_model, small, text, tmp_path, settings):
    ids = text(100, rows=2)
    mask = torch.ones_like(ids)
    mask[1, :37] = 0
    if settings.get("kv_source") == "latent":
        path = tmp_path / "maps.safetensors"
        fit_latent_maps(tiny_model(), [text(200)], dim=32, layers="2-3").save(path)
        settings = {**settings, "maps": str(path)}
    found, expected = (
        recorded(tiny_model("Llama", attention), small(**settings), ids, mask)
        for attention in ("sdpa", "eager")
    )
    assert {row for row, *_ in found} == {0, 1}
    same(found, expected)


@pytest.mark.parametrize("gate", [None, -1.0])
def test_memory_and_window_have_all_attention_together(llama, small, text, monkeypatch, gate):
    """With a softmax as it is written, over what torch's attention was given."""
    config, ids, given = small(gate_init=gate, retrieval_layers="2"), text(60), []
    attend = kernels._sdpa

    def noted(query, key, value, mask, scale):
        given.append((query, key, mask, scale))
        return attend(query, key, value, mask, scale)

    with MemoryDecoder(llama, None, config) as decoder:
        decoder.read(ids[:, :-1])
        monkeypatch.setattr(kernels, "_sdpa", noted)
        with decoder.sources() as sources:
            decoder.read(ids[:, -1:])
    query, key, mask, scale = given[2]
    logits = query @ key.repeat_interleave(2, dim=1).mT * scale + (0 if mask is None else mask)
    memory = len(sources.chunks) * config.chunk_size
    weights = (logits - logits.amax(dim=-1, keepdim=True)).exp()
    weights /= weights.sum(dim=-1, keepdim=True)
    local = float(weights[..., memory:].sum(dim=-1).mean())
    assert 0 < local < 1
    assert sum(each.mass for each in sources.chunks) + local == pytest.approx(1.0, **CLOSE)
    by_chunk = weights[..., :memory].unflatten(3, (-1, config.chunk_size)).sum(dim=4).mean(dim=(0, 1, 2))
    in_order = sorted(sources.chunks, key=lambda each: each.span)
    assert [each.mass for each in in_order] == pytest.approx(by_chunk.tolist(), **CLOSE)


def test_heads_without_memory_give_it_nothing(llama, small, text):
    """All of the other head's attention goes to memory, and none of this one's."""
    found = recorded(llama, small(gate_init=60.0, retrieval_heads="3:1"), text(200))
    share = sum(masses[0] for masses in found.values())
    memory_from = 24  # the first tokens have none
    assert share == pytest.approx(0.5 * (200 - memory_from) / 200, abs=0.02)


def test_a_planted_chunk_has_what_its_keys_are_worth(llama, small, text):
    """Of two chunks with keys of zeros, each token of both has the same logit: the gate alone."""
    config = small(gate_init=60.0, top_k=2)
    decoder = MemoryDecoder(llama, None, config)
    bank = create_bank("torch", decoder.retriever.dim, metric=decoder.retriever.metric)
    blocks = torch.zeros(2, *decoder.layout.shape)
    bank.add(torch.eye(decoder.retriever.dim)[:2], blocks, blocks, [(40, 44), (1000, 1004)])
    decoder.reset([bank], any_model=True)
    with decoder:
        decoder.read(text(3))  # the first tokens ask for nothing
        decoder.generate(text(3, seed=1), max_new_tokens=1, do_sample=False)
        with decoder.sources() as sources:
            decoder.generate(text(3, seed=1), max_new_tokens=1, do_sample=False)
    assert [(each.row, each.id, each.span) for each in sources.chunks] == [
        (0, 0, (40, 44)),
        (0, 1, (1000, 1004)),
    ]
    assert [each.mass for each in sources.chunks] == pytest.approx([0.5, 0.5], **CLOSE)


# Pages.


def test_of_chosen_pages_alone(llama, small, text, monkeypatch):
    """With a softmax as it is written, under the masks that say what each token chose."""
    config, ids, given = small(top_k=6, attended_tokens=8, retrieval_layers="1"), text(120), []
    monkeypatch.setattr("memlong.decoder.stream.batch.why_not_compiled", lambda *_: "a test")
    attend = kernels._sdpa

    def noted(query, key, value, mask, scale):
        given.append((query, key, mask, scale))
        return attend(query, key, value, mask, scale)

    monkeypatch.setattr(kernels, "_sdpa", noted)
    with MemoryDecoder(llama, None, config) as decoder:
        decoder.read(ids[:, :112])
        given.clear()
        with decoder.sources() as sources:
            decoder.read(ids[:, 112:])
    query, key, mask, scale = given[1]
    memory = len(sources.chunks) * 4
    weights = (query @ key.repeat_interleave(2, dim=1).mT * scale + mask).softmax(dim=-1)
    assert ((weights[..., :memory] > 0).sum(dim=-1) <= 8).all()
    by_chunk = weights[..., :memory].unflatten(3, (-1, 4)).sum(dim=4).mean(dim=(0, 1, 2))
    in_order = sorted(sources.chunks, key=lambda each: each.span)
    assert [each.mass for each in in_order] == pytest.approx(by_chunk.tolist(), **CLOSE)


@pytest.mark.pairwise
@pytest.mark.parametrize("heads", ["all", "0:1,1:0,3:0+1"])
@pytest.mark.parametrize("step", [1, 8, None])
@pytest.mark.parametrize("attended", [8, 10_000])
def test_of_pages_that_a_kernel_chooses(llama, small, text, monkeypatch, heads, step, attended):
    config = small(
        top_k=6, attended_tokens=attended, retrieval_heads=heads, position_mode="overlaid", gate_init=-0.1
    )
    ids = text(120, rows=2)

    def read():
        with MemoryDecoder(llama, None, config) as decoder, decoder.sources() as sources:
            for part in ids.split(step or 120, dim=1):
                decoder.read(part)
        return {(each.row, each.id, each.span): [*each.by_layer.values()] for each in sources.chunks}

    compiled = read()
    monkeypatch.setattr("memlong.decoder.stream.batch.why_not_compiled", lambda *_: "a test")
    same(compiled, read())
    assert len(compiled) > 30


# What counts.


@pytest.mark.parametrize("lengths", [[90, 41, 70]])
@pytest.mark.parametrize("kind", ["llama", "gated delta rule"])
def test_rows_are_alone_and_padding_does_not_count(llama, small, text, lengths, kind):
    model = llama if kind == "llama" else tiny_model_of(Architecture(*KINDS[kind]))
    ids = text(90, rows=3)
    mask = torch.stack([(torch.arange(90) >= 90 - length).long() for length in lengths])
    together = recorded(model, small(), ids, mask)
    for row, length in enumerate(lengths):
        alone = recorded(model, small(), ids[row : row + 1, 90 - length :])
        same({(0, *name): found for (where, *name), found in together.items() if where == row}, alone)


def answered(decoder, prompt, new, **options):
    with decoder.sources() as sources:
        output = decoder.generate(prompt, max_new_tokens=new, do_sample=False, **options)
    return sources, output


def test_of_an_answer_its_own_tokens_count(llama, small, text):
    """And the last of the prompt, which the first is made from; not the rest of the prompt."""
    prompt = text(60)
    config = small(position_mode="original", top_k=64, retrieval_layers="0-3", retrieve_every=8)
    with MemoryDecoder(llama, None, config) as decoder:
        sources, output = answered(decoder, prompt, 7, eos_token_id=[])
        expected = weights_of(decoder, output)
    found = by_span(sources)
    assert {*found} == {(start, start + 4) for start in range(2, 2 + 4 * len(found), 4)}
    tokens = slice(59, 66)
    for (start, end), source in found.items():
        masses = [each[:, tokens, start:end].sum(dim=2).mean() for each in expected.values()]
        assert [*source.by_layer.values()] == pytest.approx([float(each) for each in masses], **CLOSE)
    assert len(found) > 8


@pytest.mark.parametrize("remember", [True, False])
def test_recording_changes_nothing(llama, small, text, remember):
    ids, prompt = text(80, rows=2), text(9, rows=2, seed=1)

    def run(record):
        with MemoryDecoder(llama, None, small()) as decoder, ExitStack() as stack:
            if record:
                stack.enter_context(decoder.sources())
            logits = torch.cat([each.logits for each in decoder.stream(ids)], dim=1)
            output = decoder.generate(
                prompt,
                remember=remember,
                max_new_tokens=15,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
            return logits, output.sequences, torch.stack(output.logits), decoder.tokens_read

    for found, expected in zip(run(record=True), run(record=False), strict=True):
        assert found == expected if isinstance(found, tuple) else torch.equal(found, expected)


def test_a_sequence_that_has_ended_does_not_count(llama, small, text):
    ids, prompt = text(80, rows=2), text(9, rows=2, seed=1)
    with MemoryDecoder(llama, None, small()) as decoder:
        decoder.read(ids)
        options = {"remember": False, "max_new_tokens": 12, "do_sample": False}
        said = decoder.generate(prompt, eos_token_id=[], **options)[:, 9:]
        end = next(
            token for place, token in enumerate(said[0].tolist()) if place >= 3 and token not in said[1]
        )
        with decoder.sources() as sources:
            together = decoder.generate(prompt, eos_token_id=[end], pad_token_id=0, **options)[:, 9:]
    assert (together[0] == 0).any()
    assert not (together[1] == 0).any()
    for row in range(2):
        with MemoryDecoder(llama, None, small()) as decoder:
            decoder.read(ids[row : row + 1])
            with decoder.sources() as alone:
                decoder.generate(prompt[row : row + 1], eos_token_id=[end], pad_token_id=0, **options)
        expected, found = by_span(alone), by_span(sources, row)
        assert found.keys() == expected.keys()
        for span, each in expected.items():
            assert found[span].mass == pytest.approx(each.mass, **CLOSE)


def test_beams_and_sequences_of_a_row_count_alike(llama, small, text):
    """All of them say the same here, where a token is forced: as often as one."""
    ids, prompt = text(80, rows=2), text(9, rows=2, seed=1)

    def same_for_all(scores_of):
        return lambda _, scores: torch.full_like(scores, -1e9).index_fill_(1, torch.tensor([scores_of]), 0.0)

    def run(**options):
        with MemoryDecoder(llama, None, small()) as decoder:
            decoder.read(ids)
            with decoder.sources() as sources:
                decoder.generate(
                    prompt, max_new_tokens=9, eos_token_id=[], logits_processor=[same_for_all(7)], **options
                )
        return {(each.row, each.id, each.span): [*each.by_layer.values()] for each in sources.chunks}

    torch.manual_seed(0)
    expected = run(do_sample=False)
    assert {row for row, *_ in expected} == {0, 1}
    same(run(do_sample=True, num_return_sequences=3), expected)


def test_of_beams_each_ones_tokens_count(llama, small, text):
    """Greedy search of one beam, and several that differ: masses are a mean, never more than all attention."""
    with MemoryDecoder(llama, None, small(gate_init=60.0)) as decoder:
        decoder.read(text(80, rows=2))
        sources, _ = answered(decoder, text(9, rows=2, seed=1), 9, num_beams=3)
    for row in range(2):
        assert sum(each.mass for each in by_span(sources, row).values()) == pytest.approx(1.0, **CLOSE)


def test_scores_count_as_what_generate_says(llama, small, text):
    with MemoryDecoder(llama, None, small()) as decoder:
        decoder.read(text(80))
        prompt = text(9, seed=1)
        said, output = answered(decoder, prompt, 10, remember=False, eos_token_id=[])
        with decoder.sources() as sources:
            decoder.score(prompt, [output[0, 9:], [], output[0, 9:]], rows=2)
    found, expected = by_span(sources), by_span(said)
    assert found.keys() == expected.keys()
    for span, each in expected.items():
        assert found[span].mass == pytest.approx(each.mass, **CLOSE)


def test_prompts_over_one_stream_are_rows_of_their_own(llama, small, text):
    prompts = text(9, rows=3, seed=1)
    with MemoryDecoder(llama, None, small()) as decoder:
        decoder.read(text(80))
        together, _ = answered(decoder, prompts, 8, remember=False, eos_token_id=[])
        for row in range(3):
            alone, _ = answered(decoder, prompts[row : row + 1], 8, remember=False, eos_token_id=[])
            found, expected = by_span(together, row), by_span(alone)
            assert found.keys() == expected.keys()
            for span, each in expected.items():
                assert found[span].mass == pytest.approx(each.mass, **CLOSE)
                assert found[span].id == each.id


def test_a_chunk_that_comes_again_is_one_source(llama, small, text):
    with MemoryDecoder(llama, None, small()) as decoder, decoder.sources() as sources:
        times = [
            tuple(each.retrievals[0].ids.tolist()) for each in decoder.stream(text(200)) if each.retrievals[0]
        ]
    assert sum(map(len, times)) > len(set(sum(times, ())))
    assert sorted(each.id for each in sources.chunks) == sorted(set(sum(times, ())))


def test_chunks_that_no_bank_has_have_no_id(llama, small, text):
    """They leave the window while the answer is generated."""
    with MemoryDecoder(llama, None, small(top_k=64)) as decoder:
        decoder.read(text(40))
        sources, _ = answered(decoder, text(5, seed=1), 60, remember=False, eos_token_id=[])
        ids = decoder.banks[0].ids.tolist()
        spans = list(map(tuple, decoder.banks[0].spans_of(ids).tolist()))
    stored = dict(zip(spans, ids, strict=True))
    assert {each.span: each.id for each in sources.chunks if each.span in stored} == stored
    others = [each for each in sources.chunks if each.span not in stored]
    assert len(others) > 5
    assert all(each.id is None for each in others)


def test_chunks_of_other_banks_are_others(llama, small, text):
    with MemoryDecoder(llama, None, small()) as decoder, decoder.sources() as sources:
        decoder.read(text(60))
        first, banks = sources.chunks, decoder.banks
        decoder.reset()
        decoder.read(text(60))
    assert len(sources.chunks) == 2 * len(first)
    assert banks is not decoder.banks


def test_a_session_continues_with_ids(llama, small, text, tmp_path):
    with MemoryDecoder(llama, None, small()) as decoder:
        decoder.read(text(82))
        decoder.save(tmp_path)
        with decoder.sources() as expected:
            decoder.read(text(3, seed=1))
    with MemoryDecoder.load(tmp_path, llama, None, small()) as decoder, decoder.sources() as sources:
        decoder.read(text(3, seed=1))
    assert expected.chunks == sources.chunks
    assert all(each.id is not None for each in sources.chunks)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_backward_pass_counts_nothing_again(llama, small, text, checkpointing):
    expected = recorded(llama, small(gate_init=0.0), text(60))
    if checkpointing:
        llama.gradient_checkpointing_enable()
    with MemoryDecoder(llama, None, small(gate_init=0.0)) as decoder:
        llama.train(checkpointing)
        with decoder.sources() as sources:
            for segment in decoder.stream(text(60), gradients=True):
                segment.logits.sum().backward()
    same({(each.row, each.id, each.span): [*each.by_layer.values()] for each in sources.chunks}, expected)


# Blocks.


def test_without_memory_there_is_no_source(llama, small, text):
    with MemoryDecoder(llama, None, small()) as decoder:
        with decoder.sources() as sources:
            assert sources.chunks == ()
            decoder.read(text(8))
        decoder.read(text(60, seed=1))
        assert sources.chunks == ()
        with decoder.sources() as after:
            pass
        assert after.chunks == ()
    with MemoryDecoder(llama, None, small(backend=None)) as decoder, decoder.sources() as sources:
        decoder.read(text(60))
    assert sources.chunks == ()
    with pytest.raises(InvalidArgumentError, match="row must be a row whose tokens attended to memory"):
        sources.save_picture("nothing.png")


def test_one_block_at_a_time_of_a_decoder_that_is_attached(llama, small, text):
    decoder = MemoryDecoder(llama, None, small())
    with pytest.raises(MemlongError, match="not attached"), decoder.sources():
        pass
    with decoder:
        with (
            pytest.raises(MemlongError, match="records sources already"),
            decoder.sources(),
            decoder.sources(),
        ):
            pass
        with decoder.sources() as sources:
            decoder.read(text(60))
        found = sources.chunks
        decoder.read(text(60))
        assert sources.chunks == found


def test_attention_that_does_not_tell_is_refused(llama, small, text, monkeypatch):
    with MemoryDecoder(llama, None, small()) as decoder:
        expected = decoder.read(text(60))
        decoder.reset()
        monkeypatch.setattr(kernels, "is_plain", lambda *_: False)
        decoder.read(text(40))
        with (
            pytest.raises(
                UnsupportedModelError, match=r"what the attention of this LlamaAttention gives to memory"
            ),
            decoder.sources(),
        ):
            decoder.read(text(60)[:, 40:])
        torch.testing.assert_close(decoder.read(text(60)[:, 40:]), expected, rtol=0.0, atol=1e-5)


def test_a_picture_of_the_text(llama, small, text, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    with MemoryDecoder(llama, None, small()) as decoder, decoder.sources() as sources:
        decoder.read(text(90))
    sources.save_picture(tmp_path / "sources.png", tokens=90)
    assert (tmp_path / "sources.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(StorageError, match="Cannot write"):
        sources.save_picture(tmp_path / "nowhere" / "sources.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("memlong.decoder.sources.find_spec", lambda _: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'memlong\[plot\]'"):
        sources.save_picture(tmp_path / "sources.png")
