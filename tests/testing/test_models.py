"""Tiny models are what the suites and the tests of memlong run on."""

import pytest
import torch

from memlong.errors import UnknownNameError
from memlong.testing import ARCHITECTURES, VOCABULARY, tiny_model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_seed_makes_the_same_model(name):
    first, second = tiny_model(name), tiny_model(name)
    ids = torch.arange(3, 20)[None]
    logits = first(ids).logits
    assert torch.equal(logits, second(ids).logits)
    assert logits.shape == (1, 17, VOCABULARY)
    assert not torch.equal(logits, tiny_model(name, seed=1)(ids).logits)


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    tiny_model()
    assert torch.equal(torch.get_rng_state(), before)


def test_an_unknown_architecture_is_named():
    with pytest.raises(UnknownNameError, match=r"must be one of Llama, .*got 'LLaMA'"):
        tiny_model("LLaMA")
