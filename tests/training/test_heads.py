"""Scores of retrieval heads."""

from __future__ import annotations

import pytest
import torch

from memlong.errors import InvalidArgumentError
from memlong.training import HeadScores, score_heads


def test_a_score_is_what_distant_tokens_add_to_the_residual_stream(llama, text):
    """Against each layer's output projection of the difference, head by head, for one passage."""
    ids, seen = text(60), {}
    found = score_heads(llama, [ids], local_window=20, sink_tokens=2)
    assert (found.layers, tuple(found.scores.shape)) == ((0, 1, 2, 3), (4, 2))
    attention = llama.model.layers[1].self_attn
    with torch.no_grad(), pytest.MonkeyPatch.context() as patched:
        patched.setattr(attention, "forward", noting(attention.forward, seen))
        hidden = llama.model(ids)
    assert hidden is not None
    states, (cos, sin) = seen["hidden_states"], seen["position_embeddings"]
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    query, key, value = (
        getattr(attention, f"{name}_proj")(states).view(1, 60, -1, 12).transpose(1, 2) for name in "qkv"
    )
    query, key = apply_rotary_pos_emb(query, key, cos, sin)
    index = torch.arange(60)
    causal = index[:, None] >= index
    near = causal & ((index[:, None] - index < 20) | (index < 2))
    for kv_head in range(2):
        change = 0
        for head in (2 * kv_head, 2 * kv_head + 1):
            logits = query[0, head] @ key[0, kv_head].T * 12**-0.5
            far, local = (logits.masked_fill(~mask, -torch.inf).softmax(-1) for mask in (causal, near))
            projection = attention.o_proj.weight[:, 12 * head : 12 * head + 12]
            change = change + (far - local) @ value[0, kv_head] @ projection.T
        expected = change[20:].square().sum(-1).mean()
        torch.testing.assert_close(found.scores[1, kv_head], expected.detach(), rtol=1e-4, atol=1e-7)


def noting(forward, seen):
    def run(**options):
        seen.update(options)
        return forward(**options)

    return run


def test_the_best_heads_come_by_layer():
    found = HeadScores((3, 5), torch.tensor([[1.0, 4.0], [3.0, 2.0]]))
    assert found.best(0.5) == "3:1,5:0"
    assert found.best(0.01) == "3:1"
    assert found.best(1) == "3:0+1,5:0+1"
    with pytest.raises(InvalidArgumentError, match="share must be a number above 0 and at most 1, got 0"):
        found.best(0)


def test_the_best_layers_are_those_whose_heads_score_most_together():
    found = HeadScores((3, 5, 8), torch.tensor([[1.0, 4.0], [3.0, 3.0], [0.0, 4.5]]))
    assert [found.best_layers(count) for count in (1, 2, 3)] == ["5", "3,5", "3,5,8"]
    for count in (0, 4, 1.5):
        with pytest.raises(InvalidArgumentError, match="count must be an integer"):
            found.best_layers(count)


@pytest.mark.parametrize(
    ("passages", "options", "message"),
    [
        ([torch.zeros(1, 20, dtype=torch.long)], {}, "passages must have more than 22 tokens"),
        (
            [torch.zeros(1, 600, dtype=torch.long)],
            {},
            "and at most the 512 that the model was trained on, got 600",
        ),
        ([[1, 2, 3]], {}, "one per passage, got list"),
        ([torch.zeros(2, 60, dtype=torch.long)], {}, "one per passage, got shape \\(2, 60\\)"),
        ([torch.full((1, 60), 97)], {}, "from 0"),
        ([], {}, "passages must be a list of tensors"),
        (
            [torch.zeros(1, 60, dtype=torch.long)],
            {"local_window": 0},
            "local_window must be an integer of at least 1",
        ),
        (
            [torch.zeros(1, 60, dtype=torch.long)],
            {"sink_tokens": -1},
            "sink_tokens must be an integer of at least 0",
        ),
    ],
)
def test_what_cannot_be_scored_is_refused(llama, passages, options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        score_heads(llama, passages, **{"local_window": 20, "sink_tokens": 2, **options})


def test_a_layer_that_sees_no_farther_than_the_window_scores_nothing(tiny_model, text):
    model = tiny_model("Gemma3")  # layers 0 and 2 see 40 tokens
    found = score_heads(model, [text(120)], layers="0-3", local_window=60, sink_tokens=0)
    assert (found.scores == 0).all(dim=1).tolist() == [True, False, True, False]
