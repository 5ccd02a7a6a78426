"""The trained memories in examples, on the model that they were trained for."""

from __future__ import annotations

import inspect
import typing
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from memlong import MemoryConfig, MemoryDecoder, load_model
from memlong.decoder.model.demos import DEMOS
from memlong.evaluation import read_text, tokenize

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif((ROOT / "PKG-INFO").exists(), reason="a source archive leaves the weights out"),
    pytest.mark.skipif(find_spec(DEMOS["demo"].package) is None, reason="the demo model is not installed"),
]


@pytest.mark.parametrize(
    ("name", "share"), [("trained_demo", 20), ("trained_recall", 30), ("trained_shared", 30)]
)
def test_it_is_the_plain_model_until_it_remembers_and_reads_a_share_of_the_bytes(name, share):
    model, tokenizer = load_model("demo", dtype="float32")  # which every machine computes fast
    ids = tokenize(
        tokenizer, "Call me Ishmael. Some years ago, never mind how long precisely, I was a whale."
    )
    with torch.no_grad():
        plain = model(ids).logits[:, -1]
    folder = ROOT / "examples" / name
    long = tokenize(tokenizer, read_text(inspect.getfile(typing)), 1792)
    with MemoryDecoder.from_pretrained(folder, model, tokenizer, changes={"retrieve_for": "all"}) as decoder:
        assert torch.allclose(decoder.read(ids), plain, rtol=0.0, atol=1e-3)
        decoder.reset()
        with_memory = decoder.read(long)
        layout = decoder.layout
        assert len(decoder.banks[0]) > 3
    own = 4 * 2 * 30 * 3 * 64  # bytes of all layers' keys and values of a token, in float32
    assert layout.nbytes == layout.shape[2] * own // share
    with MemoryDecoder(model, tokenizer, MemoryConfig(backend=None)) as window:
        assert not torch.equal(with_memory, window.read(long))
