"""Embeddings that cover tokens before their chunks."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from memlong import MemoryConfig, MemoryDecoder, Passage
from memlong.corpus.reading import _Laid
from memlong.errors import InvalidArgumentError, SnapshotError

OVERLAP = 3


def embeddings_of(decoder, ids, chunks):
    """What the embeddings of a text's first chunks are to be."""
    spans = [(max(0, start - OVERLAP), start + 4) for start in range(2, 2 + 4 * chunks, 4)]
    passages = [Passage(tuple(ids[start:end]), start) for start, end in spans]
    return normalize(decoder.retriever.embed_chunks(passages), dim=1)


@pytest.mark.parametrize("length", [1, 7, 60])
def test_embeddings_reach_back_however_a_text_is_read(llama, small, text, length):
    ids = text(60, rows=2)
    with MemoryDecoder(llama, None, small(embedding_overlap=OVERLAP, query_tokens=1)) as decoder:
        for part in ids.split(length, dim=1):
            decoder.read(part)
        decoder.flush()
        for bank, row in zip(decoder.banks, ids.tolist(), strict=True):
            assert len(bank) == 14
            torch.testing.assert_close(bank.embeddings.embeddings, embeddings_of(decoder, row, 14))
            assert bank.spans_of(range(14))[:, 0].tolist() == list(range(2, 58, 4))


def test_embeddings_reach_back_in_a_fork_and_over_a_saved_session(llama, small, text, tmp_path):
    ids = text(60)
    config = small(embedding_overlap=OVERLAP, query_tokens=1)
    with MemoryDecoder(llama, None, config) as decoder:
        decoder.read(ids[:, :33])
        decoder.save(tmp_path)
    with MemoryDecoder.load(tmp_path, llama, None, config) as decoder:
        decoder.generate(ids[:, 33:40], max_new_tokens=8, do_sample=False, remember=False)
        decoder.read(ids[:, 33:])
        decoder.flush()
        expected = embeddings_of(decoder, ids[0].tolist(), 14)
        torch.testing.assert_close(decoder.banks[0].embeddings.embeddings, expected)


@pytest.mark.parametrize("overlap", [0, 2])
def test_a_memory_goes_on_with_the_overlap_it_began_with(llama, small, text, tmp_path, overlap):
    with MemoryDecoder(llama, None, small(embedding_overlap=OVERLAP)) as decoder:
        decoder.read(text(60))
        decoder.save(tmp_path)
        (bank,) = decoder.banks
    said = rf"embedding_overlap \(3 when it was saved, {overlap} now\)"
    with pytest.raises(SnapshotError, match=said):
        MemoryDecoder.load(tmp_path, llama, None, small(embedding_overlap=overlap))
    with (
        MemoryDecoder(llama, None, small(embedding_overlap=overlap)) as decoder,
        pytest.raises(InvalidArgumentError, match="embedding_overlap"),
    ):
        decoder.use_banks([bank])


@pytest.mark.parametrize("overlap", [0, 2])
def test_a_fact_that_the_end_of_a_chunk_cuts_is_found_with_both_halves(llama, small, text, overlap):
    ids = text(96)
    ids[ids >= 90] = 3
    ids[0, 40:44] = torch.tensor([90, 91, 92, 93])  # chunks begin at 38 and 42
    config = small(top_k=2, focus_tokens=2, retriever_options={"recency": 0}, embedding_overlap=overlap)
    with MemoryDecoder(llama, None, config) as decoder:
        decoder.read(ids)
        (retrieval,) = decoder.preview(ids[:, :2], queries=[[90, 91]]).retrievals
        found = decoder.banks[0].spans_of(retrieval.ids).tolist()
    assert [38, 42] in found
    assert ([42, 46] in found) == bool(overlap)


def test_an_eighth_of_a_chunk_is_usual(llama, small, text):
    assert MemoryConfig().overlap_length == 16
    ids = text(60)
    with MemoryDecoder(llama, None, small(chunk_size=8, local_window=32, segment_size=16)) as decoder:
        decoder.read(ids)
        (bank,) = decoder.banks
        spans = bank.spans_of(range(len(bank))).tolist()
        passages = [Passage(tuple(ids[0, start - 1 : end].tolist()), start - 1) for start, end in spans]
        expected = normalize(decoder.retriever.embed_chunks(passages), dim=1)
        torch.testing.assert_close(bank.embeddings.embeddings, expected)


@pytest.mark.parametrize("overlap", [0, 3])
def test_the_end_of_a_document_is_embedded_with_as_much_as_a_chunk(llama, small, overlap):
    with MemoryDecoder(llama, None, small(embedding_overlap=overlap)) as decoder:
        laid = _Laid(lead=[1, 1], words=[*range(5, 25)], tail=[3])
        assert laid.ending(decoder) == Passage(tuple(range(21 - overlap, 25)), 18 - overlap)


def test_it_is_shorter_than_a_chunk(small):
    with pytest.raises(
        InvalidArgumentError, match=r"embedding_overlap must be less than chunk_size \(4\), got 4"
    ):
        small(embedding_overlap=4)
