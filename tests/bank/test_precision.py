"""Exact search under every way in which torch may round what it multiplies."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from memlong.bank.index import exact
from memlong.bank.index.exact import nearest_rows

LEGACY = ("highest", "high", "medium")
NEW = {
    "torch.backends": (torch.backends, ("none", "ieee", "tf32", "bf16")),
    "mkldnn.matmul": (torch.backends.mkldnn.matmul, ("none", "ieee", "tf32", "bf16")),
    "cuda.matmul": (torch.backends.cuda.matmul, ("none", "ieee", "tf32")),
}
SETTINGS = [("legacy", each) for each in LEGACY] + [
    (name, each) for name, (_, values) in NEW.items() for each in values
]


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    before = {name: home.fp32_precision for name, (home, _) in NEW.items()}
    for (
        home,
        _,
    ) in NEW.values():  # as torch starts, whatever an earlier test chose: a choice hides the one above it
        home.fp32_precision = "none"
    yield
    for name, (home, _) in NEW.items():
        home.fp32_precision = before[name]
    torch.set_float32_matmul_precision("highest")
    for name, (home, _) in NEW.items():
        home.fp32_precision = before[name]


def apply(setting: tuple[str, str]) -> None:
    name, value = setting
    if name == "legacy":
        torch.set_float32_matmul_precision(value)
    else:
        NEW[name][0].fp32_precision = value


@pytest.mark.parametrize("setting", SETTINGS, ids=" ".join)
@pytest.mark.parametrize("similarity", ["inner_product", "l2"])
@pytest.mark.parametrize("count", [1, 5])
def test_the_true_best_are_among_the_rows(setting, similarity, count):
    generator = torch.Generator().manual_seed(0)
    middle = torch.randn(1, 256, generator=generator)
    # Close enough together that products rounded to bfloat16 rank them wrongly.
    vectors = middle + 0.001 * torch.randn(2000, 256, generator=generator)
    queries = middle + 0.001 * torch.randn(count, 256, generator=generator)
    wide, asked = vectors.double(), queries.double()
    scores = asked @ wide.T if similarity == "inner_product" else -torch.cdist(asked, wide).square()
    wanted = scores.topk(8, dim=1).indices
    apply(setting)
    found = nearest_rows(queries, vectors, vectors.square().sum(dim=1), 8, similarity)
    for mine, true in zip(found, wanted, strict=True):
        assert set(true.tolist()) <= set(mine.tolist())


def test_the_vectors_are_such_that_bfloat16_ranks_them_wrongly():
    generator = torch.Generator().manual_seed(0)
    middle = torch.randn(1, 256, generator=generator)
    vectors = middle + 0.001 * torch.randn(2000, 256, generator=generator)
    query = middle + 0.001 * torch.randn(1, 256, generator=generator)
    coarse = (vectors.bfloat16().float() @ query.bfloat16().float().T)[:, 0].topk(24).indices
    true = (vectors.double() @ query.double().T)[:, 0].topk(8).indices
    assert not set(true.tolist()) <= set(coarse.tolist())


@pytest.mark.parametrize(
    ("setting", "device", "rounding"),
    [
        (("legacy", "highest"), "cpu", 0),
        (("legacy", "medium"), "cpu", 2**-7),
        (("legacy", "high"), "cuda", 2**-10),
        (("torch.backends", "tf32"), "cuda", 2**-10),
        (("mkldnn.matmul", "bf16"), "cpu", 2**-7),
        (("mkldnn.matmul", "bf16"), "cuda", 0),
        (("cuda.matmul", "tf32"), "cpu", 0),
        (("cuda.matmul", "tf32"), "mps", 2**-7),  # of which torch does not tell: the coarsest
    ],
)
def test_the_bound_is_that_of_the_vectors_device(setting, device, rounding):
    apply(setting)
    assert exact.input_rounding(torch.device(device)) == rounding


def test_queries_of_the_host_are_bounded_by_where_the_vectors_are():
    apply(("cuda.matmul", "tf32"))
    queries = torch.ones(1, 8, dtype=torch.float32, device="cpu")
    there, here = (
        exact._score_error(queries, torch.device(device), 1.0, "inner_product") for device in ("cuda", "cpu")
    )
    assert there > 100 * here
