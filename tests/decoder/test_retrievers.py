"""The built-in retrievers."""

from __future__ import annotations

import pytest
import torch

from memlong.decoder import Passage, create_retriever
from memlong.errors import InvalidArgumentError


class Words:
    """A tokenizer as far as retrievers need one."""

    def decode(self, token_ids):
        return " ".join(f"word{token}" for token in token_ids)


def passages(*starts):
    return [Passage(tuple(range(3 + start, 11 + start)), start) for start in starts]


@pytest.mark.parametrize("name", ["lm", "random", "recent"])
def test_an_embedding_depends_on_its_passage_alone(llama, name):
    retriever = create_retriever(name, llama, Words())
    together = retriever.embed_chunks(passages(0, 16, 40))
    assert together.shape == (3, retriever.dim)
    assert together.dtype == torch.float32
    for row, start in enumerate((0, 16, 40)):
        assert torch.equal(retriever.embed_chunks(passages(start))[0], together[row])


def test_lm_finds_the_passage_that_shares_its_words(llama):
    retriever = create_retriever("lm", llama, Words())
    chunks = retriever.embed_chunks(passages(0, 20, 40, 60))
    query = retriever.embed_queries(passages(42))
    scores = torch.nn.functional.cosine_similarity(query, chunks)
    assert int(scores.argmax()) == 2


def test_recent_prefers_the_latest(llama):
    retriever = create_retriever("recent", llama, Words())
    scores = retriever.embed_queries(passages(80)) @ retriever.embed_chunks(passages(0, 64, 32)).T
    assert scores.argsort(descending=True).tolist() == [[1, 2, 0]]


def test_random_reaches_every_chunk_and_follows_its_seed(llama):
    retriever = create_retriever("random", llama, Words(), {"seed": 1})
    chunks = retriever.embed_chunks(passages(*range(0, 64, 8)))
    best = (retriever.embed_queries(passages(*range(80))) @ chunks.T).argmax(dim=1)
    assert len(set(best.tolist())) == 8
    other = create_retriever("random", llama, Words(), {"seed": 2})
    assert not torch.equal(other.embed_chunks(passages(0)), chunks[:1])


def test_an_option_that_a_retriever_lacks_is_named(llama):
    with pytest.raises(InvalidArgumentError, match="retriever 'random' has no option 'sed'"):
        create_retriever("random", llama, Words(), {"sed": 1})


def test_a_folder_that_holds_no_model_is_refused(llama, tmp_path):
    with pytest.raises(InvalidArgumentError, match="could not be loaded"):
        create_retriever(str(tmp_path), llama, Words())
