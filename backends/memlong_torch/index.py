"""TorchIndex: exact brute-force search in torch."""

from __future__ import annotations

import numpy as np
import torch

from memlong.bank import Floats, Ids, Index, IndexRows, NoOptions
from memlong.bank.index.exact import nearest_rows
from memlong.bank.store.copying import keep_while_read, to_device
from memlong.bank.store.traffic import Traffic, note
from memlong.errors import DeviceUnavailableError


class TorchIndex(Index[NoOptions]):
    """Exact search, on the CPU or a CUDA device.

    On the CPU it searches the bank's own table without a copy. On a CUDA device it keeps a float32 copy of the
    table there, plus squared norms for "l2"; a search then synchronizes with the device once, for its result.
    """

    devices = ("cpu", "cuda")

    def __init__(self, rows: IndexRows, options: NoOptions) -> None:
        super().__init__(rows, options)
        on_device = rows.device.type != "cpu"
        self._mirror = DeviceMatrix(rows.dim, rows.device) if on_device else None
        self._norms = DeviceMatrix(1, rows.device) if on_device and rows.similarity == "l2" else None

    @classmethod
    def usable_device(cls, device: str | torch.device | None) -> torch.device:
        """Return the requested device, if torch can use it."""
        chosen = super().usable_device(device)
        if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
            raise DeviceUnavailableError(
                f"device must be one that torch {torch.__version__} can use, got {str(chosen)!r}, and it sees "
                f"{torch.cuda.device_count()} CUDA devices: use device='cpu', or install a CUDA build of torch and "
                "check the driver with nvidia-smi"
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
        else:  # unused for the inner product
            squared_norms = vectors[:0] if self._norms is None else self._norms.rows[:, 0]
        numbers = nearest_rows(
            torch.from_numpy(queries), vectors, squared_norms, k, rows.similarity, longest=rows.longest
        ).numpy()
        return np.where(numbers < 0, -1, rows.ids[numbers])

    def remove(self, ids: Ids) -> bool:
        """Remove rows; later rows move up."""
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
    """A float32 [n, dim] matrix on a device that grows by doubling and stays contiguous when rows are removed.

    Parameters
    ----------
    dim : int
        Dimension of the rows.
    device : torch.device
        Where it is stored.
    """

    def __init__(self, dim: int, device: torch.device) -> None:
        self._dim = dim
        self._device = device
        self._count = 0
        self._data = torch.empty(0, dim, dtype=torch.float32, device=device)
        self._traffic = Traffic()  # a search may rebuild the index while other CUDA streams are reading it

    @property
    def rows(self) -> torch.Tensor:
        """The matrix [n, dim], for the current CUDA stream; a view that is valid until the next change.

        Changes are ordered among themselves, but a reader must have synchronized with its result before the next one.
        """
        if self._device.type == "cuda":
            self._traffic.hold_back(torch.cuda.current_stream(self._device), writing=False)
        return self._data[: self._count]

    def append(self, embeddings: Floats) -> None:
        """Append rows."""
        held = self.rows
        count = len(held) + len(embeddings)
        with torch.inference_mode(False), torch.no_grad():
            if count > len(self._data):
                capacity = max(2 * count, 64)
                grown = torch.empty(capacity, self._dim, dtype=torch.float32, device=self._device)
                grown[: len(held)] = held
                keep_while_read([self._data])
                self._data = grown
            self._data[len(held) : count] = to_device(torch.from_numpy(embeddings), self._device)
        self._note(count)

    def remove(self, rows: Ids) -> None:
        """Remove the rows with these numbers; later rows move up."""
        keep = np.ones(self._count, dtype=bool)
        keep[rows] = False
        with torch.inference_mode(False), torch.no_grad():
            kept = self.rows[to_device(torch.from_numpy(np.flatnonzero(keep)), self._device)]
            self._data[: len(kept)] = kept
        self._note(len(kept))

    def clear(self) -> None:
        """Remove all rows and free the memory."""
        self._count = 0
        self._data = torch.empty(0, self._dim, dtype=torch.float32, device=self._device)

    def _note(self, count: int) -> None:
        if self._device.type == "cuda":
            note([self._traffic], torch.cuda.current_stream(self._device), writing=True)
        self._count = count
