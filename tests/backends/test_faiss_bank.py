"""What is particular to FaissBank."""

from __future__ import annotations

from types import SimpleNamespace

import faiss
import pytest
import torch

from memlong.bank import bank_of
from memlong.errors import DeviceUnavailableError, InvalidArgumentError
from memlong_faiss import gpu
from memlong_faiss.index import FaissIndex
from memlong_faiss.recipe import Recipe

FaissBank = bank_of(FaissIndex)


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ("Bogus", "could not parse index string Bogus"),
        ("", "could not parse"),
        ("IVF16", "could not parse"),
        ("IVF16,PQ7", "should be a multiple of the number of subquantizers"),
        ("IVF0,Flat", "must be a Flat, HNSW, IVF or SQ one"),
        ("IDMap,Flat", "must be .* or SQ one, got 'IDMap,Flat', a IndexIDMap"),
        ("IVF16,Flat,RFlat", "IndexRefineFlat"),
        ("PQ8", "IndexPQ"),
        ("NSG32,Flat", "IndexNSGFlat"),
        # What FAISS builds, and then fails on as it trains or searches:
        ("PCA64,Flat", "must not have more PCA dimensions than the 32 of its input, got 64"),
        ("RR8,PCAR16,IVF16,Flat", "more PCA dimensions than the 8 of its input, got 16"),
        ("HNSW32_16+PQ8", "does not support search parameters"),
        ("IVF16,RQ4x4fs", "does not support search parameters"),
        ("IVF16_NSG8,Flat", "coarse quantizer, got a IndexNSGFlat"),
        ("IVF16(PQ4),Flat", "coarse quantizer, got a IndexPQ"),
    ],
)
def test_an_index_that_cannot_be_used_is_an_error_with_examples(index, reason):
    with pytest.raises(InvalidArgumentError, match=reason) as caught:
        FaissBank(32, index=index)
    assert "IVF256,Flat" in str(caught.value)


def test_an_index_that_cannot_be_trained_is_named_with_the_reason():
    def train(embeddings):
        raise RuntimeError("Error in train at here.cpp:1: too few")

    recipe = Recipe(16, "IVF16,Flat", "inner_product", 200, 64, 16)
    with pytest.raises(InvalidArgumentError, match=r"cannot train index 'IVF16,Flat' on 3 .*: too few"):
        recipe.train(SimpleNamespace(is_trained=False, train=train), torch.zeros(3, 16).numpy())


@pytest.mark.parametrize("train_size", [0, -1, float("nan"), True, "many"])
@pytest.mark.parametrize("index", ["Flat", "HNSW32", "IVF16,Flat"])
def test_train_size_is_checked_whether_or_not_it_is_needed(index, train_size):
    with pytest.raises(InvalidArgumentError, match="train_size must be an integer"):
        FaissBank(16, index=index, train_size=train_size)


ABSURD = ["HNSW0", "HNSW1", "HNSW999999999", "IVF4_HNSW1,Flat", "IVF99999999,Flat", "Pad999999999,Flat"]


@pytest.mark.parametrize("index", [*ABSURD, "PQ4x24", "IMI2x24,Flat", "9" * 5000, "Flat" * 99])
def test_an_index_that_faiss_would_die_of_is_refused(index):
    with pytest.raises(InvalidArgumentError, match="index '"):
        FaissBank(16, index=index)


@pytest.mark.parametrize("option", ["ef_search", "ef_construction", "nprobe", "refine", "build_threads"])
def test_options_have_a_limit(option):
    with pytest.raises(InvalidArgumentError, match=f"{option} must be an integer (.* at most|from 1 to)"):
        FaissBank(16, **{option: 2**40})


@pytest.mark.parametrize("option", ["ef_search", "ef_construction", "nprobe", "refine", "build_threads"])
@pytest.mark.parametrize("value", [0, 1.5, "many"])
def test_options_are_checked(option, value):
    with pytest.raises(InvalidArgumentError, match=f"{option} must be an integer"):
        FaissBank(32, **{option: value})


@pytest.mark.parametrize("index", ["IVF16,SQ8", "SQ8", "HNSW16_SQ8", "HNSW16_PQ8", "PCA16,IVF16,Flat"])
@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_other_factories_work(index, metric, fill):
    bank = FaissBank(32, index=index, metric=metric, train_size=256, refine=8)
    vectors = torch.randn(600, 32)
    fill(bank, vectors)
    assert bank.index.is_trained
    bank.remove(range(0, 100, 2))
    queries = torch.randn(20, 32)
    found, true = bank.search(queries, 10), bank.exact_search(queries, 10)
    assert not set(range(0, 100, 2)) & set(found.ids.ravel().tolist())
    assert (found.scores >= true.scores[:, -1:]).float().mean() > 0.6


def test_searches_are_exact_until_there_is_enough_to_train_on(fill):
    bank = FaissBank(32, index="IVF16,PQ8", train_size=300, nprobe=1)
    queries = torch.randn(20, 32)
    fill(bank, torch.randn(299, 32))
    assert not bank.index.is_trained
    assert torch.equal(bank.search(queries, 10).ids, bank.exact_search(queries, 10).ids)
    fill(bank, torch.randn(1, 32))
    assert bank.index.is_trained
    assert not torch.equal(bank.search(queries, 10).ids, bank.exact_search(queries, 10).ids)


def test_a_bank_that_shrinks_below_the_training_size_is_exact_again(fill):
    bank = FaissBank(32, index="IVF16,PQ8", train_size=300, nprobe=1)
    fill(bank, torch.randn(310, 32))
    bank.remove(range(100))
    queries = torch.randn(20, 32)
    assert torch.equal(bank.search(queries, 10).ids, bank.exact_search(queries, 10).ids)
    assert not bank.index.is_trained


def test_the_default_training_size_is_what_faiss_advises(fill):
    bank = FaissBank(8, index="IVF4,Flat")
    fill(bank, torch.randn(39 * 4 - 1, 8))
    assert not bank.index.is_trained
    fill(bank, torch.randn(1, 8))
    assert bank.index.is_trained
    assert FaissBank(8).index.is_trained
    assert not FaissBank(8, index="HNSW8").index.is_trained


def test_too_small_a_training_size_is_an_error():
    with pytest.raises(InvalidArgumentError, match=r"train_size must be at least 256, .* got 100"):
        FaissBank(32, index="IVF16,PQ8", train_size=100)


@pytest.mark.parametrize(("index", "train_size"), [("HNSW16", None), ("IVF4,Flat", 4)])
def test_the_index_is_rebuilt_once_a_fifth_is_dead(index, train_size, fill):
    bank = FaissBank(16, index=index, train_size=train_size)
    fill(bank, torch.randn(100, 16))
    bank.remove(range(20))
    bank.search(torch.randn(1, 16), 1)
    assert len(bank.index._numbers) == 100
    bank.remove([20])
    bank.search(torch.randn(1, 16), 1)
    assert len(bank.index._numbers) == len(bank) == 79


@pytest.mark.parametrize("index", ["HNSW16", "IVF16,Flat", "IVF16,SQ8", "SQ8", "PCA16,IVF16,Flat"])
def test_dead_rows_are_passed_over_by_the_index_itself(index, fill):
    bank = FaissBank(32, index=index, train_size=64, nprobe=16)
    fill(bank, torch.randn(300, 32))
    bank.remove(range(50))
    named = bank.index.search(torch.randn(20, 32).numpy(), 10)
    assert (named >= 50).all()


@pytest.mark.parametrize("index", ["HNSW16", "IVF16,Flat", "IVF16,PQ8"])
def test_building_is_reproducible(index, fill):
    vectors, queries = torch.randn(600, 32), torch.randn(30, 32)
    banks = [FaissBank(32, index=index, train_size=256, nprobe=2, ef_search=10) for _ in range(2)]
    for bank in banks:
        fill(bank, vectors)
    first, second = (bank.search(queries, 10) for bank in banks)
    assert torch.equal(first.ids, second.ids)
    assert torch.equal(first.scores, second.scores)


def test_settings_of_faiss_are_left_as_they_were(fill):
    before = faiss.omp_get_max_threads(), faiss.cvar.distance_compute_blas_threshold
    bank = FaissBank(16, index="HNSW16")
    fill(bank, torch.randn(50, 16))
    bank.search(torch.randn(40, 16), 3)
    assert (faiss.omp_get_max_threads(), faiss.cvar.distance_compute_blas_threshold) == before


def test_a_wider_search_finds_more(fill):
    vectors, queries = torch.randn(600, 32), torch.randn(50, 32)

    def recall(**options):
        bank = FaissBank(32, **options)
        fill(bank, vectors)
        return (
            (bank.search(queries, 10).scores >= bank.exact_search(queries, 10).scores[:, -1:]).float().mean()
        )

    ivf = {"index": "IVF16,Flat", "train_size": 64}
    assert recall(**ivf, nprobe=16) == 1.0
    assert recall(**ivf, nprobe=1) < recall(**ivf, nprobe=8)
    assert recall(index="HNSW4", ef_search=1) < recall(index="HNSW4", ef_search=200)


@pytest.mark.skipif(hasattr(faiss, "StandardGpuResources"), reason="this FAISS has GPU code")
def test_a_faiss_without_gpu_code_says_what_to_install():
    with pytest.raises(
        DeviceUnavailableError, match=r"faiss-cpu .* has no GPU support.*memlong\[faiss-gpu\]"
    ):
        FaissBank(8, device="cuda")


def test_a_faiss_that_sees_no_gpu_says_so(monkeypatch):
    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0)
    with pytest.raises(DeviceUnavailableError, match=r"the 0 GPUs that FAISS sees, got .*: check the driver"):
        FaissBank(8, device="cuda")


@pytest.mark.usefixtures("fake_gpu")
def test_graphs_cannot_go_to_a_gpu():
    with pytest.raises(DeviceUnavailableError, match=r"must be a Flat or IVF one on cuda.*HNSW8"):
        FaissBank(8, index="HNSW8", device="cuda")


@pytest.mark.usefixtures("fake_gpu")
def test_the_limit_of_k_on_a_gpu_is_an_error_and_dead_rows_stay_within_it(fill):
    bank = FaissBank(8, device="cuda")
    fill(bank, torch.randn(3000, 8))
    with pytest.raises(InvalidArgumentError, match=r"k must be at most 2048 .* got 2049"):
        bank.search(torch.randn(1, 8), 2049)
    bank.remove(range(500))
    assert (bank.search(torch.randn(2, 8), 2048).ids >= 500).all()


def test_two_owners_of_the_module_are_warned_of(monkeypatch):
    monkeypatch.setattr(gpu, "packages_distributions", lambda: {"faiss": ["faiss-gpu", "faiss-cpu"]})
    gpu.owners.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="provided by faiss-cpu and faiss-gpu"):
            FaissBank(8)
    finally:
        gpu.owners.cache_clear()
