"""Gates: a bias of each head on its logits of memory."""

from __future__ import annotations

import pytest
import torch

from memlong import MemoryDecoder
from memlong.decoder.model.gates import MemoryGates
from memlong.decoder.persistence.tensor_file import write_tensors
from memlong.errors import InvalidArgumentError


def logits(model, config, ids):
    with MemoryDecoder(model, None, config) as decoder:
        return torch.cat([segment.logits for segment in decoder.stream(ids)], dim=1)


def test_a_gate_of_zero_changes_nothing(tiny_model, architecture, attention, small, text):
    model, ids = tiny_model(architecture, attention), text(100)
    found = logits(model, small(gate_init=0.0), ids)
    torch.testing.assert_close(found, logits(model, small(), ids), rtol=0.0, atol=1e-4)


def test_a_closed_gate_is_the_plain_model(tiny_model, architecture, attention, small, text):
    """At the tokens' own positions: else sinks and window stand apart by the place for memory."""
    model, ids = tiny_model(architecture, attention), text(100)
    settings = {"kv_source": "shared", "position_mode": "original"}
    plain = logits(model, small(backend=None, **settings), ids)
    closed = logits(model, small(gate_init=-60, **settings), ids)
    torch.testing.assert_close(closed, plain, rtol=0.0, atol=1e-4)
    nearly = logits(model, small(gate_init=-8, **settings), ids)
    wide = logits(model, small(**settings), ids)
    assert (nearly - plain).norm() < 0.2 * (wide - plain).norm()


def test_a_gate_is_of_one_head_of_one_layer(llama, small, text):
    ids = text(100)
    open_ = logits(llama, small(gate_init=0.0, retrieval_layers="1,3"), ids)
    with MemoryDecoder(llama, None, small(gate_init=0.0, retrieval_layers="1,3")) as decoder:
        seen = []
        for module in (layer.self_attn.o_proj for layer in llama.model.layers):
            module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        *_, last = decoder.stream(ids)
        before, seen[:] = seen[-4:], []
        torch.testing.assert_close(last.logits, open_[:, -last.logits.shape[1] :])
        decoder.reset()
        with torch.no_grad():
            decoder.gates.bias[1, 2] = -60.0
        *_, last = decoder.stream(ids)
    after = seen[-4:]
    for layer in range(3):
        torch.testing.assert_close(after[layer], before[layer])
    width = llama.model.layers[3].self_attn.head_dim
    changed = [
        not torch.allclose(one, other, atol=1e-6)
        for one, other in zip(before[3].split(width, dim=-1), after[3].split(width, dim=-1), strict=True)
    ]
    assert changed == [False, False, True, False]


def test_gates_come_back_as_they_were_saved(llama, small, tmp_path):
    gates = MemoryGates((1, 3), torch.randn(2, 4))
    gates.save(tmp_path / "gates.safetensors")
    decoder = MemoryDecoder(
        llama, None, small(gates=str(tmp_path / "gates.safetensors"), retrieval_layers="1,3")
    )
    assert torch.equal(decoder.gates.bias, gates.bias)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gates": "/nowhere"}, "gates names '/nowhere', which cannot be read"),
        ({"gate_init": "open"}, "gate_init must be a number .*, got 'open'"),
        (
            {"gates": "{file}", "retrieval_layers": "2"},
            r"made for the layers \(1, 3\) with 4 heads, but memory",
        ),
    ],
)
def test_what_cannot_be_is_said(llama, small, tmp_path, changes, words):
    file = tmp_path / "gates.safetensors"
    MemoryGates((1, 3), torch.zeros(2, 4)).save(file)
    changes = {name: str(file) if value == "{file}" else value for name, value in changes.items()}
    with pytest.raises(InvalidArgumentError, match=words):
        MemoryDecoder(llama, None, small(**changes))


@pytest.mark.parametrize(
    "bias",
    [torch.zeros(4, 4, dtype=torch.int64), torch.zeros(4), torch.full((4, 4), float("nan"))],
    ids=["integers", "one dimension", "nan"],
)
def test_gates_that_cannot_be_are_named_with_their_file(tmp_path, bias):
    path = tmp_path / "gates.safetensors"
    write_tensors(path, "memlong-gates-1", (0, 1, 2, 3), {"bias": bias})
    with pytest.raises(InvalidArgumentError, match=r"gates names '.*gates\.safetensors'"):
        MemoryGates.load(path)
