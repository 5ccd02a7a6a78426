"""Rows that are trained together find and learn what each does alone."""

from __future__ import annotations

import pytest
import torch

from memlong import MemoryDecoder
from memlong.decoder.model.forward import AttentionPass
from memlong.training import fit_latent_maps

LENGTHS = [(90, 90, 90), (90, 51, 70), (30, 90, 8)]


@pytest.fixture
def source(llama, text, tmp_path):
    """Settings of a K-V source by its name."""

    def make(name):
        if name != "latent":
            return {"kv_source": name}
        path = tmp_path / "maps.safetensors"
        fit_latent_maps(llama, [text(200)], dim=32, layers="2-3").save(path)
        return {"kv_source": "latent", "maps": str(path), "retrieval_layers": "2-3"}

    return make


def trained(decoder, ids, mask):
    """Return retrievals and losses of each segment, and the gradients of all."""
    decoder.reset()
    maps = getattr(decoder.source, "maps", None)
    parameters = [*decoder.model.parameters(), *(maps.parameters() if maps is not None else ())]
    for parameter in parameters:
        parameter.grad = None
    found, losses = [], []
    with decoder:
        for segment in decoder.stream(ids, mask, gradients=True):
            counts = segment.tokens >= 0
            each = segment.logits.logsumexp(dim=-1).masked_fill(~counts, 0).sum(dim=1)
            each.sum().backward()
            losses.append(each.detach())
            found.append(segment.retrievals)
    gradients = [torch.zeros_like(each) if each.grad is None else each.grad.clone() for each in parameters]
    return found, torch.stack(losses), gradients


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("name", ["layer", "shared", "latent"])
def test_rows_together_do_what_each_does_alone(llama, small, text, source, name, lengths):
    decoder = MemoryDecoder(llama, None, small(**source(name)))
    ids = text(max(lengths), rows=len(lengths))
    mask = (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]).long()
    together, losses, gradients = trained(decoder, ids, mask)
    expected = [torch.zeros_like(each) for each in gradients]
    for row, length in enumerate(lengths):
        alone, own, parts = trained(decoder, ids[row : row + 1, :length], None)
        for total, part in zip(expected, parts, strict=True):
            total += part
        torch.testing.assert_close(losses[: len(own), row], own[:, 0], rtol=1e-5, atol=1e-4)
        for mine, (theirs,) in zip(together, alone, strict=False):
            assert (mine[row] is None) == (theirs is None)
            if theirs is not None:
                assert torch.equal(mine[row].query, theirs.query)
                assert torch.equal(mine[row].ids, theirs.ids)
                assert torch.equal(mine[row].scores, theirs.scores)
    for mine, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_rows_that_are_alike_share_a_mask(llama, small, text, monkeypatch):
    made = []
    build = AttentionPass._build

    def noted(*args):
        made.append(build(*args))
        return made[-1]

    monkeypatch.setattr(AttentionPass, "_build", noted)
    ids = text(64, rows=2)
    with MemoryDecoder(llama, None, small()) as decoder:
        decoder.read(ids)
        assert made
        assert all(each.shape[0] == 2 and each.stride(0) == 0 for each in made)
        decoder.reset()
        made.clear()
        decoder.read(ids, torch.tensor([[1] * 64, [1] * 40 + [0] * 24]))
    assert any(each.stride(0) for each in made)
