"""TorchIndex: exact search by brute force in torch."""

from __future__ import annotations

import numpy as np
import torch

from memlong.bank import Floats, Ids, Index, IndexRows, NoOptions
from memlong.bank.index.exact import nearest_rows
from memlong.bank.store.copying import keep_while_read, to_device
from memlong.bank.store.traffic import Traffic, note
from memlong.errors import DeviceUnavailableError


class TorchIndex(Index[NoOptions]):
    """Always finds the true k best chunks, on the CPU or on a CUDA device.

    On the CPU it searches the bank's own table and keeps no second copy. On a CUDA device it keeps one
    float32 matrix there, beside the table, with the rows' squared lengths for "l2". A search then waits for the
    device once, for what it has found.
    """

    devices = ("cpu", "cuda")

    def __init__(self, rows: IndexRows, options: NoOptions) -> None:
        super().__init__(rows, options)
        on_device = rows.device.type != "cpu"
        self._mirror = DeviceMatrix(rows.dim, rows.device) if on_device else None
        self._norms = DeviceMatrix(1, rows.device) if on_device and rows.similarity == "l2" else None

    @classmethod
    def usable_device(cls, device: str | torch.device | None) -> torch.device:
        """Return the device asked for, if torch has it."""
        chosen = super().usable_device(device)
        if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
            raise DeviceUnavailableError(
                f"device {str(chosen)!r} was asked for, but torch {torch.__version__} sees "
                f"{torch.cuda.device_count()} CUDA devices; use device='cpu', or install a CUDA build of "
                "torch and check the driver with nvidia-smi"
            )
        return chosen

    def add(self, ids: Ids, embeddings: Floats) -> None:
        """Copy new rows to the device."""
        if self._mirror is not None:
            self._mirror.append(embeddings)
        if self._norms is not None:
            self._norms.append(self.rows.squared_norms[-len(ids) :, None])

    def search(self, queries: Floats, k: int) -> Ids:
        """Score all rows."""
        rows, mirror = self.rows, self._mirror
        vectors = torch.from_numpy(rows.embeddings) if mirror is None else mirror.rows
        if mirror is None:
            squared_norms = torch.from_numpy(rows.squared_norms)
        else:  # nothing reads them for an inner product
            squared_norms = vectors[:0] if self._norms is None else self._norms.rows[:, 0]
        numbers = nearest_rows(
            torch.from_numpy(queries), vectors, squared_norms, k, rows.similarity, longest=rows.longest
        ).numpy()
        return np.where(numbers < 0, -1, rows.ids[numbers])

    def remove(self, ids: Ids) -> bool:
        """Let later rows move up."""
        for matrix in self._matrices:
            matrix.remove(self.rows.rows_of(ids))
        return True

    def reset(self) -> None:
        """Drop all rows."""
        for matrix in self._matrices:
            matrix.clear()

    @property
    def _matrices(self) -> list[DeviceMatrix]:
        return [matrix for matrix in (self._mirror, self._norms) if matrix is not None]


class DeviceMatrix:
    """A float32 [n, dim] matrix on a device that grows by doubling and closes up over removed rows.

    Parameters
    ----------
    dim : int
        Width of the rows.
    device : torch.device
        Where it lies.
    """

    def __init__(self, dim: int, device: torch.device) -> None:
        self._dim = dim
        self._device = device
        self._count = 0
        self._data = torch.empty(0, dim, dtype=torch.float32, device=device)
        self._traffic = (
            Traffic()
        )  # a search may rebuild the index: those on other streams know nothing of that

    @property
    def rows(self) -> torch.Tensor:
        """The matrix, [n, dim], for the current stream; a view that is valid until the next change.

        Changes heed one another. Whoever reads it must have waited for what came of that before the next one.
        """
        if self._device.type == "cuda":
            self._traffic.hold_back(torch.cuda.current_stream(self._device), writing=False)
        return self._data[: self._count]

    def append(self, embeddings: Floats) -> None:
        """Add rows at the end."""
        held = self.rows
        count = len(held) + len(embeddings)
        with torch.inference_mode(False), torch.no_grad():
            if count > len(self._data):
                room = max(2 * count, 64)
                grown = torch.empty(room, self._dim, dtype=torch.float32, device=self._device)
                grown[: len(held)] = held
                keep_while_read([self._data])
                self._data = grown
            self._data[len(held) : count] = to_device(torch.from_numpy(embeddings), self._device)
        self._note(count)

    def remove(self, rows: Ids) -> None:
        """Drop the rows with these numbers; later rows move up."""
        keep = np.ones(self._count, dtype=bool)
        keep[rows] = False
        with torch.inference_mode(False), torch.no_grad():
            kept = self.rows[to_device(torch.from_numpy(np.flatnonzero(keep)), self._device)]
            self._data[: len(kept)] = kept
        self._note(len(kept))

    def clear(self) -> None:
        """Drop every row and give the memory back."""
        self._count = 0
        self._data = torch.empty(0, self._dim, dtype=torch.float32, device=self._device)

    def _note(self, count: int) -> None:
        if self._device.type == "cuda":
            note([self._traffic], torch.cuda.current_stream(self._device), writing=True)
        self._count = count
