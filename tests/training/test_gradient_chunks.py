"""Gradients into what is stored: they reach the encoding of the latest chunks, and are those of the loss."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from memlong import MemoryDecoder
from memlong.decoder.kv.latent import LatentMaps
from memlong.decoder.model.weights import module_digest
from memlong.errors import InvalidArgumentError
from memlong.training import Trainer, TrainingConfig, fit_latent_maps
from memlong.training.parts import keeping_chunks

LATENT = {"kv_source": "latent", "retrieval_layers": "all", "top_k": 2}


def test_the_encoding_is_trained_only_with_gradient_chunks(trainer):
    for count in (0, 2):
        run = trainer(LATENT, lora_rank=0, gradient_chunks=count, lr=3e-2, folder=f"run{count}")
        before = run.decoder.source.maps.encode.detach().clone()
        run.run()
        encode = run.decoder.source.maps.encode
        moved = (encode - before).abs().max() / before.abs().max()
        assert (moved > 0.02) == bool(count)  # saving rounds it
        assert not encode.requires_grad
        assert run.decoder.source.gradient_chunks == 0


def test_a_bfloat16_model_keeps_its_dtype(decoder, documents, tmp_path):
    made = decoder(**LATENT)
    half = MemoryDecoder(made.model.to(torch.bfloat16), None, made.config)
    config = TrainingConfig(steps=2, rows=2, document_tokens=64, lora_rank=0, gradient_chunks=2)
    Trainer(half, documents, config, folder=tmp_path / "run").run()
    assert half.source.maps.encode.dtype == torch.bfloat16


def test_layers_that_are_not_encoded_yet_learn_to_be(tiny_model, small, text, documents, tmp_path):
    model = tiny_model("Llama")
    fit_latent_maps(model, [text(200)], memory_layer=2).save(tmp_path / "maps.safetensors")
    made = MemoryDecoder(model, None, small(**LATENT, maps=str(tmp_path / "maps.safetensors")))
    assert not made.source.maps.encode[:, :2].any()
    config = TrainingConfig(
        steps=4, rows=2, document_tokens=64, lora_rank=0, gradient_chunks=2, lr=3e-2, warmup_steps=0
    )
    Trainer(made, documents, config, folder=tmp_path / "run").run()
    encode = made.source.maps.encode
    assert encode[:, 0].abs().max() > 0.02 * encode[:, 2].abs().max()


def test_what_is_made_again_is_what_was_stored(trainer):
    first = [
        trainer(LATENT, gradient_chunks=count, folder=f"run{count}", steps=1).run()[0] for count in (0, 8)
    ]
    assert first[0].loss == pytest.approx(first[1].loss, rel=1e-6)


def test_the_gradient_is_that_of_the_loss(tiny_model, small, text, tmp_path):
    model = tiny_model("Llama")
    fit_latent_maps(model, [text(200)], dim=32).save(tmp_path / "maps.safetensors", compact=False)
    ids, config = text(72), small(**LATENT, maps=str(tmp_path / "maps.safetensors"))
    direction = None

    def loss(step):
        nonlocal direction
        with MemoryDecoder(model, None, config) as decoder:
            decoder.source.gradient_chunks = 8
            encode = decoder.source.maps.encode.requires_grad_()
            decoder.read(ids[:, :64])
            if direction is None:
                direction = torch.randn(encode.shape, generator=torch.Generator().manual_seed(0))
                direction /= direction.norm()
            encode.data += step * direction
            (segment,) = decoder.stream(ids[:, 64:72], gradients=True)
            return cross_entropy(segment.logits[0, :-1], ids[0, 65:72]), encode

    value, encode = loss(0.0)
    (gradient,) = torch.autograd.grad(value, encode)
    size = 0.02 * float(encode.detach().norm())
    slope = (loss(size)[0] - loss(-size)[0]).detach() / (2 * size)
    assert float((gradient * direction).sum()) == pytest.approx(float(slope), rel=0.05, abs=1e-6)
    assert gradient.abs().max() > 0


def test_a_run_that_was_interrupted_leaves_nothing_on(trainer):
    run = trainer(LATENT, gradient_chunks=2, lora_rank=0)

    def interrupt(step):
        assert run.decoder.source.gradient_chunks == 2
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.run(progress=interrupt)
    assert run.decoder.source.gradient_chunks == 0
    maps = run.decoder.source.maps
    plain = LatentMaps(maps.layers, maps.mean, maps.encode.detach(), maps.decode.detach())
    assert module_digest(maps) == module_digest(plain)


def test_only_the_latest_are_kept(trainer, text):
    decoder = trainer(LATENT, gradient_chunks=2).decoder
    with decoder, keeping_chunks(decoder.source, 2):
        decoder.read(text(90))
        (stream,) = decoder._streams.batch.streams
        assert sorted(stream.latest) == stream.bank.ids[-2:].tolist()


def test_without_maps_it_is_refused(trainer):
    with pytest.raises(InvalidArgumentError, match="gradient_chunks must be 0 unless maps"):
        trainer({"kv_source": "layer"}, gradient_chunks=1)
