"""Maps of queries: their file, whose memories they read, and that no map and the zero map are the same."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from memlong import MemoryConfig, MemoryDecoder
from memlong.decoder.persistence.fingerprint import query_facts
from memlong.decoder.retrievers.baselines import RandomRetriever
from memlong.decoder.retrievers.query_map import QueryMap
from memlong.errors import InvalidArgumentError


def made_for(decoder):
    return query_facts(decoder.config, decoder.retriever, decoder.model)


@pytest.fixture
def write(llama, small, tmp_path):
    """Write a map for the retriever of a configuration; random, or one that changes nothing."""

    def made(config=None, *, changes_nothing=False, name="map.safetensors"):
        decoder = MemoryDecoder(llama, None, config or small())
        found = QueryMap.identity(decoder.retriever.dim, 2, made_for=made_for(decoder))
        if not changes_nothing:
            torch.manual_seed(0)
            with torch.no_grad():
                found.scale.copy_(torch.randn(decoder.retriever.dim))
        found.save(tmp_path / name)
        return str(tmp_path / name)

    return made


def read(decoder, ids):
    """All retrievals of a text, and the last logits."""
    found = []
    for segment in decoder.stream(ids):
        found += [each for each in segment.retrievals if each is not None]
    return found, segment.logits


def test_a_map_that_changes_nothing_is_no_map(llama, small, text, write):
    ids, both = text(150), []
    for query_map in (None, write(changes_nothing=True)):
        with MemoryDecoder(llama, None, small(query_map=query_map)) as decoder:
            both.append(read(decoder, ids))
    (plain, logits), (mapped, same) = both
    assert len(plain) == len(mapped) > 10
    for one, other in zip(plain, mapped, strict=True):
        assert torch.equal(one.ids, other.ids)
        assert torch.equal(one.scores, other.scores)
        assert torch.equal(one.query, other.query)
    assert torch.equal(logits, same)


def test_queries_are_mapped_and_chunks_are_not(llama, small, text, write):
    ids, path = text(150), write()
    with MemoryDecoder(llama, None, small(query_map=path)) as decoder:
        found, _ = read(decoder, ids)
        bank, retriever = decoder.banks[0], decoder.retriever
    query_map = QueryMap.load(path)
    with MemoryDecoder(llama, None, small()) as decoder:
        plain, _ = read(decoder, ids)
        assert torch.equal(bank.embeddings_of(bank.ids), decoder.banks[0].embeddings_of(decoder.banks[0].ids))
    assert retriever is not None
    torch.testing.assert_close(found[-1].query, query_map(plain[-1].query).detach())
    expected = bank.search(found[-1].query[None], 3)
    torch.testing.assert_close(found[-1].scores.sort().values, expected.scores[0].sort().values)
    assert any(one.ids.tolist() != other.ids.tolist() for one, other in zip(plain, found, strict=True))


def test_a_memory_is_read_with_a_map_and_without(llama, small, text, write, tmp_path):
    path = write()
    with MemoryDecoder(llama, None, small()) as decoder:
        decoder.read(text(150))
        decoder.save(tmp_path / "memory")
        bank = decoder.banks[0]
    with MemoryDecoder(llama, None, small(query_map=path)) as decoder:
        decoder.reset(banks=[bank])
        decoder.read(text(16, seed=1))
        decoder.read(text(16, seed=2))
    with MemoryDecoder.load(tmp_path / "memory", llama, None, small(query_map=path)) as decoder:
        decoder.read(text(16, seed=3))
        decoder.save(tmp_path / "again")
    with MemoryDecoder.load(tmp_path / "again", llama, None, small()) as decoder:
        assert decoder.tokens_read == (166,)


def test_saved_and_loaded_are_equal(write):
    path = write()
    one, other = QueryMap.load(path), QueryMap.load(path)
    other.save(path)
    again = QueryMap.load(path)
    for name, each in one.named_parameters():
        assert torch.equal(each, dict(again.named_parameters())[name])
    assert one.made_for == again.made_for


def test_a_trained_decoder_takes_its_map_along(llama, small, text, write, tmp_path):
    folder, path = tmp_path / "trained", write()
    with MemoryDecoder(llama, None, small(query_map=path)) as decoder:
        _, logits = read(decoder, text(150))
        decoder.save_pretrained(folder)
    assert json.loads((folder / "memlong.json").read_text())["memory"]["query_map"] == "query_map.safetensors"
    with MemoryDecoder.from_pretrained(folder, llama, None) as decoder:
        assert torch.equal(read(decoder, text(150))[1], logits)
    for changes in ({"query_map": None}, {"retriever": "random"}):
        with MemoryDecoder.from_pretrained(folder, llama, None, changes=changes) as decoder:
            assert decoder.config.query_map is None
            assert not torch.equal(read(decoder, text(150))[1], logits)
    with pytest.raises(InvalidArgumentError, match="made for the retriever"):
        MemoryDecoder.from_pretrained(folder, llama, None, changes={"retriever_options": {"dim": 64}})


@pytest.mark.parametrize("name", ["/etc/passwd", "../map.safetensors"])
def test_a_strangers_folder_names_no_file_outside(llama, small, write, tmp_path, name):
    folder = tmp_path / "trained"
    MemoryDecoder(llama, None, small(query_map=write())).save_pretrained(folder)
    facts = json.loads((folder / "memlong.json").read_text())
    facts["memory"]["query_map"] = name
    (folder / "memlong.json").write_text(json.dumps(facts))
    with pytest.raises(InvalidArgumentError, match="must be the name of a file in the folder"):
        MemoryDecoder.from_pretrained(folder, llama, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"retriever_options": {"recency": 0}},
            "options {}, dim .*, but the retriever is .*recency.: 0}, dim",
        ),
        ({"retriever": "random"}, "made for the retriever .* but the retriever is"),
        ({"retriever": "recent"}, "compares by cosine, got RecentRetriever"),
        (
            {"retriever": "hybrid", "retriever_options": {"retrievers": "lm,random"}},
            "compares by cosine, got HybridRetriever",
        ),
    ],
)
def test_a_map_is_of_one_retriever(llama, small, write, changes, message):
    with pytest.raises(InvalidArgumentError, match=message):
        MemoryDecoder(llama, None, small(query_map=write(), **changes))


def test_a_retriever_that_ranks_anew_takes_no_map(llama, small, write):
    class Choosy(RandomRetriever):
        candidates = 6

    with pytest.raises(InvalidArgumentError, match="does not re-rank, as Choosy does"):
        MemoryDecoder(llama, None, small(query_map=write()), retriever=Choosy(llama, None))


def test_a_map_is_of_one_vocabulary(llama, small, write):
    path = write()
    llama.resize_token_embeddings(101, mean_resizing=False)
    with pytest.raises(
        InvalidArgumentError, match=r"made for the retriever .* vocabulary 97.*, but .* vocabulary 101"
    ):
        MemoryDecoder(llama, None, small(query_map=path))


GOOD = {"scale": torch.ones(3), "down": torch.zeros(1, 3), "up": torch.zeros(3, 1)}
FACTS = {"format": "memlong-query-map-1", "retriever": "[]"}


@pytest.mark.parametrize(
    ("tensors", "facts", "message"),
    [
        ({"up": torch.zeros(3, 2)}, {}, "must be .dim., .rank, dim. and .dim, rank."),
        ({"scale": torch.ones(2)}, {}, "must be .dim., .rank, dim. and .dim, rank."),
        ({"scale": torch.ones(3, 1)}, {}, "must be .dim., .rank, dim. and .dim, rank."),
        ({"scale": torch.tensor([1.0, torch.nan, 1.0])}, {}, "scale holds numbers that are not finite"),
        ({"down": torch.full((1, 3), torch.inf)}, {}, "down holds numbers that are not finite"),
        ({"scale": torch.ones(3, dtype=torch.int64)}, {}, "its numbers are integers"),
        ({"up": None}, {}, "holds no query map: it has no 'up'"),
        ({}, {"format": "memlong-gates-1"}, "must name a file of format 'memlong-query-map-1'"),
        ({}, {"retriever": "{}"}, "does not say for which retriever"),
        ({}, {"retriever": "[" * 100_000}, "holds no query map"),
        ({}, {"retriever": "nothing"}, "holds no query map"),
        ({}, {"retriever": None}, "holds no query map: it has no 'retriever'"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, tensors, facts, message):
    path = tmp_path / "map.safetensors"
    kept = {name: each for name, each in {**GOOD, **tensors}.items() if each is not None}
    save_file(
        kept, path, metadata={name: each for name, each in {**FACTS, **facts}.items() if each is not None}
    )
    with pytest.raises(InvalidArgumentError, match=message):
        QueryMap.load(path)


def test_a_file_that_is_none_is_refused(tmp_path):
    path = tmp_path / "map.safetensors"
    with pytest.raises(
        InvalidArgumentError, match=r"query_map names .*map.safetensors.*memlong train-retriever"
    ):
        QueryMap.load(path)
    path.write_bytes(b"no safetensors")
    with pytest.raises(InvalidArgumentError, match="which cannot be read"):
        QueryMap.load(path)


def test_huge_numbers_in_a_file_do_not_break_a_query(llama, small, text, write):
    """What a stranger's map makes of a query may overflow, which is told and stores nothing bad."""
    path = write()
    found = QueryMap.load(path)
    with torch.no_grad():
        found.down.fill_(3e38)
        found.up.fill_(3e38)
    found.save(path)
    with (
        MemoryDecoder(llama, None, small(query_map=path)) as decoder,
        pytest.raises(InvalidArgumentError, match="finite"),
    ):
        decoder.read(text(150))


def test_a_configuration_names_its_map():
    assert MemoryConfig(query_map="map.safetensors").as_dict()["query_map"] == "map.safetensors"
