"""A null chunk: read beside what is retrieved and nowhere else, trained, saved, and no source of anything."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from memlong import MemoryDecoder, load_bank
from memlong.decoder.kv.null_chunk import NullChunk
from memlong.decoder.pages.room import Room
from memlong.decoder.stream.asking import ask
from memlong.errors import InvalidArgumentError, SnapshotError
from memlong.evaluation import evaluate_perplexity
from memlong.training import Trainer, TrainingConfig
from memlong.training.processes import Processes

KINDS = pytest.mark.parametrize(
    "memory",
    [
        {},
        {"kv_source": "layer", "retrieval_layers": "all"},
        {"kv_source": "layer", "position_mode": "original"},
        {"kv_source": "layer", "position_mode": "compressed"},
        {"kv_source": "latent", "retrieval_layers": "all"},
    ],
    ids=["shared", "layer", "original", "compressed", "latent"],
)


def trained(trainer, memory, **changes):
    run = trainer({"top_k": 3, **memory}, null_chunk=True, lora_rank=0, **changes)
    before = run.decoder.source.null_chunk.keys.clone()
    run.run()
    return run, before


@KINDS
def test_it_is_trained_saved_and_loaded(trainer, text, memory):
    run, before = trained(trainer, memory)
    chunk = run.decoder.source.null_chunk
    assert not torch.equal(chunk.keys, before)
    assert not chunk.keys.requires_grad
    other = MemoryDecoder.from_pretrained(run.folder, model=run.decoder.model)
    assert torch.equal(other.source.null_chunk.values, chunk.values)
    ids = text(70)
    with run.decoder:
        wanted = run.decoder.read(ids)
    with other:
        assert torch.equal(other.read(ids), wanted)


def test_it_stands_before_what_is_retrieved_and_takes_a_place(trainer, text):
    run, _ = trained(trainer, {"kv_source": "layer"})
    decoder = run.decoder
    with decoder:
        *_, last = decoder.stream(text(80))
        (stream,) = decoder._streams.batch.streams
        assert len(last.retrievals[0].ids) == 2
        forks, _ = ask(decoder._streams.batch, decoder.config)
        assert len(forks.streams[0].retrieval.ids) == 2
        assert stream.memory.spans[0].tolist() == [-decoder.config.chunk_size, 0]
        assert torch.equal(stream.memory.blocks[0].keys, decoder.source.null_chunk.keys)
        assert len(stream.memory.blocks) == 3


def test_it_is_written_once(trainer, text, monkeypatch):
    run, _ = trained(trainer, {"kv_source": "layer", "attended_tokens": 8})
    written, write = [], Room._write

    def noting(room, row, slots, new, count, width):
        written.extend(block.keys for block, _ in new)
        write(room, row, slots, new, count, width)

    monkeypatch.setattr(Room, "_write", noting)
    with run.decoder as decoder:
        decoder.read(text(100))
    null = decoder.source.null_chunk.keys
    assert len(written) > 3
    assert sum(each is null for each in written) == 1


def test_without_chunks_the_model_is_the_plain_one(trainer, text):
    run, _ = trained(trainer, {"kv_source": "layer"})
    model = run.decoder.model
    plain = MemoryDecoder(model, None, replace(run.decoder.config, backend=None, null_chunk=None))
    ids = text(16)
    with run.decoder:
        found = run.decoder.read(ids)
    with plain:
        assert torch.equal(plain.read(ids), found)


def test_it_is_no_source(trainer, text):
    run, _ = trained(trainer, {"kv_source": "layer"})
    with run.decoder as decoder, decoder.sources() as sources:
        decoder.generate(text(70), max_new_tokens=4)
        assert sources.chunks
        assert all(chunk.span[0] >= 0 and chunk.id is not None for chunk in sources.chunks)


def test_a_saved_session_continues_with_it(trainer, text, tmp_path):
    run, _ = trained(trainer, {"kv_source": "layer"})
    decoder, ids, more = run.decoder, text(70), text(20, seed=5)
    with decoder:
        decoder.read(ids)
        decoder.save(tmp_path / "session")
        wanted = decoder.read(more)
        decoder.save_pretrained(tmp_path / "trained")
    config = MemoryDecoder.from_pretrained(tmp_path / "trained", model=decoder.model).config
    with MemoryDecoder.load(tmp_path / "session", decoder.model, None, config) as other:
        torch.testing.assert_close(other.read(more), wanted)
    without = replace(config, null_chunk=None)
    with pytest.raises(SnapshotError, match="what differs: null_chunk"):
        MemoryDecoder.load(tmp_path / "session", decoder.model, None, without)


def test_recall_is_of_the_chunks_that_are_retrieved(trainer, text):
    decoder = trained(trainer, {"kv_source": "layer"})[0].decoder
    assert decoder.retrieved_chunks == 2
    with decoder:
        result = evaluate_perplexity(decoder, text(100))
    assert result.recall_at_k == 1.0


@pytest.mark.parametrize("count", [1, 2])
def test_a_session_keeps_what_it_retrieved_when_a_base_is_added(trainer, text, tmp_path, count):
    decoder = trained(trainer, {"kv_source": "layer"})[0].decoder
    for seed in range(2):
        with decoder:
            decoder.reset()
            decoder.read(text(70, seed=20 + seed))
            decoder.flush()
            decoder.banks[0].save(tmp_path / f"base{seed}")
    with decoder:
        decoder.reset(bases=[load_bank(tmp_path / "base0")])
        decoder.read(text(70))
        had = decoder._streams.batch.streams[0].memory
        decoder.save(tmp_path / "session")
        bases = [load_bank(tmp_path / f"base{seed}") for seed in range(count)]
        decoder.restore(tmp_path / "session", bases=bases, any_bases=True)
        memory = decoder._streams.batch.streams[0].memory
    assert memory.ids == had.ids
    assert memory.ids[0] == -1
    assert torch.equal(memory.keys, had.keys)


def test_all_processes_train_that_of_the_main_one(trainer, monkeypatch):
    run = trainer({"top_k": 3, "kv_source": "layer"}, null_chunk=True, lora_rank=0, steps=1)
    monkeypatch.setattr(Processes, "tensor_from_main", lambda _, tensor: torch.full_like(tensor, 7))
    run.run()
    keys = run.decoder.source.null_chunk.keys
    torch.testing.assert_close(keys, torch.full_like(keys, 7), atol=0.02, rtol=0)


def test_training_resumes_to_the_same(trainer, tmp_path):
    whole, _ = trained(trainer, {"kv_source": "layer"}, folder="whole", steps=8)
    part = trainer(
        {"top_k": 3, "kv_source": "layer"}, null_chunk=True, lora_rank=0, steps=8, checkpoint_every=1
    )
    stop = RuntimeError("stop")

    def interrupt(step):
        if step.step == 5:
            raise stop

    with pytest.raises(RuntimeError, match="stop"):
        part.run(progress=interrupt)
    again = trainer(
        {"top_k": 3, "kv_source": "layer"}, null_chunk=True, lora_rank=0, steps=8, checkpoint_every=1
    )
    again.run(resume=True)
    assert torch.equal(again.decoder.source.null_chunk.keys, whole.decoder.source.null_chunk.keys)


def test_it_needs_two_places(trainer):
    with pytest.raises(InvalidArgumentError, match="top_k must be at least 2 with a null chunk"):
        trainer({"top_k": 1, "kv_source": "layer"}, null_chunk=True)


def test_a_decoder_that_cannot_be_trained_has_none(decoder, documents, tmp_path):
    made = decoder(kv_source="layer", top_k=3)
    config = TrainingConfig(rows=2, document_tokens=64, lora_rank=0, null_chunk=True, gradient_chunks=1)
    with pytest.raises(InvalidArgumentError, match="gradient_chunks must be 0"):
        Trainer(made, documents, config, folder=tmp_path / "run")
    assert made.source.null_chunk is None


def test_a_file_for_other_blocks_is_refused(decoder, documents, tmp_path):
    path = tmp_path / "null.safetensors"
    NullChunk(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4)).save(path)
    with pytest.raises(InvalidArgumentError, match="of shape"):
        decoder(kv_source="layer", null_chunk=str(path), top_k=2)
    path.write_bytes(b"nothing")
    with pytest.raises(InvalidArgumentError, match="null_chunk names"):
        decoder(kv_source="layer", null_chunk=str(path), top_k=2)


def test_one_trained_for_other_layers_is_refused(trainer, decoder):
    run, _ = trained(trainer, {"kv_source": "layer"}, steps=1)
    given = {"null_chunk": str(run.folder / "null_chunk.safetensors"), "kv_source": "layer", "top_k": 3}
    decoder(**given)
    message = r"trained with retrieval_layers \[2, 3\], .* this memory has retrieval_layers \[0, 1\]"
    with pytest.raises(InvalidArgumentError, match=message):
        decoder(**given, retrieval_layers="0-1")


def test_a_given_one_is_trained_on(decoder, documents, tmp_path):
    path = tmp_path / "null.safetensors"
    plain = decoder(kv_source="layer", top_k=3)
    shape = plain._setup.block_layout.shape
    given = NullChunk(torch.ones(shape), torch.ones(shape))
    given.save(path)
    made = decoder(kv_source="layer", top_k=3, null_chunk=str(path))
    config = TrainingConfig(steps=2, rows=2, document_tokens=64, lora_rank=0, null_chunk=True)
    run = Trainer(made, documents, config, folder=tmp_path / "run")
    assert torch.equal(made.source.null_chunk.keys, given.keys)
    assert run.trainable_parameters == 2 * given.keys.numel()
