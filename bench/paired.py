"""Time a bank and the bare index library alternately, on the same vectors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from ratios import Clock, Ratio, best_times
from raw import Raw, make_raw
from setting import Setting
from vectors import PART, Data, K

from memlong import MemoryBank, Registry

BATCHES = {1: 1.3, 32: 1.1}  # batch size: target ratio
TARGET_CHUNKS = 10_000
SPARE = 4096  # capacity for chunks added while measuring

SETTINGS = (
    Setting("torch"),
    Setting("faiss", {"index": "Flat"}),
    Setting("faiss", {"index": "HNSW32"}),
    Setting("hnswlib"),
)
SWEEP = (
    *(Setting("hnswlib", {"ef": ef}) for ef in (8, 16, 32, 128, 256)),
    *(Setting("faiss", {"index": "HNSW32", "ef_search": ef}) for ef in (8, 16, 32, 128, 256)),
    *(Setting("faiss", {"index": "IVF64,Flat", "nprobe": lists}) for lists in (1, 4, 16)),
)


@dataclass(frozen=True)
class Row:
    """The measurements of a setting: seconds of the bank and of the library, by operation."""

    setting: str
    dim: int
    chunks: int
    recall: float
    raw_recall: float
    index_bytes: int
    bank: dict[str, float]
    raw: dict[str, float]

    @property
    def ratios(self) -> list[Ratio]:
        """The bank's times relative to the library's."""
        place = f"{self.setting}, {self.chunks:,} x {self.dim}"
        return [
            Ratio(f"{what} of {place}", seconds / self.raw[what], self._target(what))
            for what, seconds in self.bank.items()
        ]

    def _target(self, what: str) -> float | None:
        targets = {f"{act} {batch}": most for batch, most in BATCHES.items() for act in ("search", "add")}
        has_target = self.chunks == TARGET_CHUNKS and self.setting in {each.name for each in SETTINGS}
        return targets.get(what) if has_target else None


def measure(setting: Setting, data: Data, clock: Clock, device: torch.device, rounds: int) -> Row:
    """Build bank and index on the device, and time the same operations on both, alternately."""
    bank = Registry().create_bank(
        setting.backend, data.stored.shape[1], device=str(device), **setting.options
    )
    library = make_raw(setting.backend, setting.options, data.stored, len(data.stored) + SPARE, device)

    def settle() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def timed(act: Callable[[], None]) -> float:
        started = clock.now()
        act()
        settle()
        return clock.now() - started

    seconds = {"build": {"bank": timed(_filling(bank, data)), "raw": timed(_filling(library, data))}}
    recalls = (
        data.recall(np.concatenate([bank.search(each[None], K).ids.numpy() for each in data.queries])),
        data.recall(library.search(data.queries, K)),
    )
    index_bytes = library.nbytes
    slab = torch.zeros(len(data.stored) + SPARE, 1, 1, 1, 1)
    for batch in BATCHES:
        queries = [data.queries[at : at + batch] for at in range(0, len(data.queries), batch)]
        new = [data.new[at : at + batch] for at in range(0, len(data.new), batch)]
        searches: dict[str, Callable[[int], object]] = {
            "bank": lambda number, queries=queries: bank.search(queries[number % len(queries)], K),
            "raw": lambda number, queries=queries: library.search(queries[number % len(queries)], K),
        }
        retrievals: dict[str, Callable[[int], object]] = {
            "bank": lambda number, queries=queries: bank.retrieve(queries[number % len(queries)], K),
            "raw": lambda number, queries=queries: [
                slab[found] for found in [library.search(queries[number % len(queries)], K)] * 2
            ],
        }
        block, spans = torch.zeros(batch, 1, 1, 1, 1), [(0, 1)] * batch
        adds: dict[str, Callable[[int], object]] = {
            "bank": lambda number, new=new, block=block, spans=spans: bank.add(
                new[number % len(new)], block, block, spans
            ),
            "raw": lambda number, new=new: library.add(new[number % len(new)]),
        }
        timing = {"clock": clock, "rounds": rounds, "settle": settle}
        seconds[f"search {batch}"] = best_times(searches, **timing)
        seconds[f"retrieve {batch}"] = best_times(retrievals, **timing)
        seconds[f"add {batch}"] = best_times(adds, **timing, most_calls=max(64 // batch, 4))
    of_bank, of_raw = ({what: each[whose] for what, each in seconds.items()} for whose in ("bank", "raw"))
    return Row(setting.name, data.stored.shape[1], len(data.stored), *recalls, index_bytes, of_bank, of_raw)


def _filling(index: MemoryBank | Raw, data: Data) -> Callable[[], None]:
    def fill() -> None:
        for at in range(0, len(data.stored), PART):
            part = data.stored[at : at + PART]
            if isinstance(index, MemoryBank):
                block = torch.zeros(len(part), 1, 1, 1, 1)
                index.add(part, block, block, [(0, 1)] * len(part))
            else:
                index.add(part)

    return fill
