"""score() is what generate() would say: its likelihoods, and memory that is retrieved when generate() retrieves it."""

from __future__ import annotations

import pytest
import torch
from transformers import LogitsProcessor

from memlong import MemoryDecoder
from memlong.errors import InvalidArgumentError, MemlongError

LENGTHS = (1, 5, 40, 0, 17)


class Forced(LogitsProcessor):
    """Lets generate() say given tokens, and notes how likely they were, and which ones it would have said."""

    def __init__(self, targets):
        self.targets, self.likelihoods, self.greedy = list(targets), [], []

    def __call__(self, input_ids, scores):
        target = self.targets[len(self.greedy)]
        self.likelihoods.append(float(scores[0].log_softmax(-1)[target]))
        self.greedy.append(int(scores.argmax()) == target)
        chosen = torch.full_like(scores, float("-inf"))
        chosen[0, target] = 0
        return chosen


def said(decoder, prompt, targets):
    forced = Forced(targets)
    if targets:
        decoder.generate(
            prompt,
            remember=False,
            max_new_tokens=len(targets),
            do_sample=False,
            eos_token_id=[],
            logits_processor=[forced],
        )
    return forced


@pytest.mark.pairwise
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("every", [None, 1, 3, 8])
@pytest.mark.parametrize("read", [0, 60])
def test_it_scores_what_generate_says(tiny_model, architecture, small, text, read, every, rows):
    ids = text(read + 13)
    continuations = [text(length, seed=length)[0].tolist() for length in LENGTHS]
    with MemoryDecoder(tiny_model(architecture), None, small(retrieve_every=every)) as decoder:
        if read:
            decoder.read(ids[:, :read])
        before = decoder.tokens_read
        found = decoder.score(ids[:, read:], continuations, rows=rows)
        assert decoder.tokens_read == before
        for targets, mine in zip(continuations, found, strict=True):
            forced = said(decoder, ids[:, read:], targets)
            torch.testing.assert_close(mine.tokens, torch.tensor(forced.likelihoods), atol=1e-5, rtol=0)
            assert mine.is_greedy.tolist() == forced.greedy


def test_within_the_window_it_is_the_plain_models(tiny_model, architecture, small, text):
    model, ids, more = tiny_model(architecture), text(8), text(9, seed=1)
    with torch.no_grad():
        logits = model(torch.cat([ids, more], dim=1)).logits[0, 7:-1]
    with MemoryDecoder(model, None, small()) as decoder:
        (found,) = decoder.score(ids, [more[0]])
    expected = logits.log_softmax(-1).gather(1, more.T)[:, 0]
    torch.testing.assert_close(found.tokens, expected, atol=1e-5, rtol=0)
    assert torch.equal(found.is_greedy, logits.argmax(-1) == more[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": torch.ones(2, 3, dtype=torch.long)}, r"must be one prompt .*, got shape \(2, 3\)"),
        ({"input_ids": torch.ones(1, 0, dtype=torch.long)}, r"must be one prompt of at least one token"),
        (
            {"continuations": [[1], [[2]]]},
            r"continuations\[1\] must hold token ids \[tokens\], got torch.int64 of shape \(1, 1\)",
        ),
        ({"continuations": [["a"]]}, r"continuations\[0\] must hold token ids, got \['a'\]"),
        ({"continuations": [[1.5]]}, r"continuations\[0\] must hold token ids \[tokens\], got torch.float32"),
        ({"continuations": [[99999]]}, r"continuations\[0\] must be from 0 to 96, .* got 99999"),
        ({"continuations": None}, "continuations must be a list of token ids for each, got None"),
        ({"rows": 0}, "rows must be an integer of at least 1, got 0"),
    ],
)
def test_bad_input_is_explained(llama, small, text, change, message):
    given = {"input_ids": text(9), "continuations": [[4, 5]], "rows": 2, **change}
    with MemoryDecoder(llama, None, small()) as decoder, pytest.raises(InvalidArgumentError, match=message):
        decoder.score(given["input_ids"], given["continuations"], rows=given["rows"])


def test_one_stream_is_continued(llama, small, text):
    with MemoryDecoder(llama, None, small()) as decoder:
        decoder.read(text(9, rows=2))
        with pytest.raises(InvalidArgumentError, match="continues one stream, and 2 have been read"):
            decoder.score(text(9), [[1]])


def test_a_model_that_is_not_attached_is_refused(llama, small, text):
    with pytest.raises(MemlongError, match="attached"):
        MemoryDecoder(llama, None, small()).score(text(9), [[1]])
