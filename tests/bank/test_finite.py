"""Keys and values that are not finite are refused, before they are stored or with the next change."""

from __future__ import annotations

import pytest
import torch

from memlong.bank import Draft, bank_of, base, draft
from memlong.bank.finite import Finiteness
from memlong.errors import InvalidArgumentError
from memlong_torch.index import TorchIndex

TorchBank = bank_of(TorchIndex)

SHAPE = (2, 1, 4, 8)
SPOILED = [
    ("keys", float("nan")),
    ("values", float("inf")),
    ("values", -float("inf")),
    ("keys", float("inf")),
]


def chunks(count, spoiled=None, number=0.0, dtype=torch.float32):
    states = {name: torch.ones(count, *SHAPE, dtype=dtype) for name in ("keys", "values")}
    if spoiled is not None:
        states[spoiled][-1, 1, 0, 2, 3] = number
    return torch.eye(4)[:count], states["keys"], states["values"], [(i, i + 1) for i in range(count)]


@pytest.fixture
def device(monkeypatch):
    """A device that takes its time; the list of what the host waited for."""
    waits = []

    class Late(Finiteness):
        is_known = False

        def require(self):
            waits.append(self)
            super().require()

    for module in (base, draft):
        monkeypatch.setattr(module, "Finiteness", Late)
    return waits


@pytest.mark.parametrize(("name", "number"), SPOILED)
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2]
)
def test_they_are_named_and_nothing_is_stored(name, number, dtype):
    for bank in (TorchBank(4), Draft(TorchBank(4))):
        with pytest.raises(InvalidArgumentError, match=f"^{name} must be finite"):
            bank.add(*chunks(2, name, number, dtype))
        assert len(bank) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_largest_and_smallest_numbers_of_a_dtype_are_finite(dtype):
    extremes = torch.finfo(dtype)
    for number in (extremes.max, extremes.min, extremes.tiny, -0.0):
        Finiteness(*chunks(1, "values", number, dtype)[1:3]).require()


def test_no_numbers_are_finite():
    Finiteness(torch.empty(0, *SHAPE), torch.empty(0, *SHAPE)).require()


def test_by_default_one_wait_is_before_anything_is_stored(device):
    bank = TorchBank(4)
    bank.add(*chunks(2))
    assert len(device) == 1
    with pytest.raises(InvalidArgumentError, match="keys must be finite"):
        bank.add(*chunks(1, "keys", float("nan")))
    assert len(bank) == 2


def test_without_the_check_first_only_the_next_change_waits(device):
    bank = TorchBank(4)
    bank.add(*chunks(2), check_first=False)
    bank.retrieve(torch.ones(1, 4), 2)
    bank.fetch([0])
    assert device == []
    bank.add(*chunks(1), check_first=False)
    assert len(device) == 1
    bank.evict(0)
    bank.evict(0)
    assert len(device) == 2


@pytest.mark.parametrize("change", ["add", "remove", "evict", "save"])
def test_the_next_change_removes_them_and_says_so(device, change, tmp_path):
    bank = TorchBank(4)
    bank.add(*chunks(1), check_first=False)
    bank.add(*chunks(2, "values", float("nan")), check_first=False)
    changes = {
        "add": lambda: bank.add(*chunks(1)),
        "remove": lambda: bank.remove([0]),
        "evict": lambda: bank.evict(1),
        "save": lambda: bank.save(tmp_path / "bank"),
    }
    with pytest.raises(
        InvalidArgumentError, match=r"chunks \[1, 2\], .*removed again: values must be finite.*nan"
    ):
        changes[change]()
    assert bank.ids.tolist() == [0]
    changes[change]()
    assert bank.ids.tolist() == {"add": [0, 3], "remove": [], "evict": [], "save": [0]}[change]


def test_chunks_that_have_left_by_then_are_named_all_the_same(device):
    bank = TorchBank(4, max_chunks=1)
    bank.add(*chunks(2, "keys", float("nan")), check_first=False)
    assert bank.ids.tolist() == [1]
    with pytest.raises(InvalidArgumentError, match=r"chunks \[0, 1\]"):
        bank.add(*chunks(1))
    assert len(bank) == 0


def test_a_reset_forgets_them(device):
    bank = TorchBank(4)
    bank.add(*chunks(1, "keys", float("nan")), check_first=False)
    bank.reset()
    assert bank.add(*chunks(1)).tolist() == [1]


def test_a_draft_that_holds_them_takes_nothing_more(device):
    beam = Draft(TorchBank(4))
    beam.add(*chunks(1, "keys", float("nan")), check_first=False)
    for each in (beam, beam.fork()):
        with pytest.raises(InvalidArgumentError, match=r"keys must be finite.*nan"):
            each.add(*chunks(1))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize(("name", "number"), SPOILED)
def test_on_a_gpu_it_is_found_out_without_a_wait(name, number):
    bank = TorchBank(4)
    embeddings, keys, values, spans = chunks(2, name, number)
    keys, values = keys.cuda(), values.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        bank.add(embeddings, keys, values, spans, check_first=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with pytest.raises(InvalidArgumentError, match=f"removed again: {name} must be finite"):
        bank.evict(0)
    with pytest.raises(InvalidArgumentError, match=f"^{name} must be finite"):
        bank.add(embeddings, keys, values, spans)
    assert len(bank) == 0
