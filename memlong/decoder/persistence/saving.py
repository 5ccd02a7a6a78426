"""SavingDecoder: streams and their memory, saved into a folder and gone on with from there."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import safetensors.torch
import torch
from torch import Tensor
from transformers import PreTrainedModel

from memlong.bank import MemoryBank, TieredStore
from memlong.bank.of_class import of_class
from memlong.bank.snapshot.files import damaged
from memlong.bank.snapshot.manifest import ExtraRecord, Manifest
from memlong.bank.snapshot.reader import folder_of, open_snapshot, read_bank
from memlong.bank.snapshot.saving import write_bank
from memlong.bank.snapshot.segments import check_finite
from memlong.bank.snapshot.tensors import read_streams
from memlong.bank.snapshot.writer import SnapshotWriter
from memlong.decoder.config import MemoryConfig
from memlong.decoder.interrupts import uninterrupted
from memlong.decoder.model.machine import DTYPES, loading_in
from memlong.decoder.persistence.fingerprint import differences, fingerprint
from memlong.decoder.retrievers.base import Retriever
from memlong.decoder.stream.streaming import StreamingDecoder
from memlong.decoder.stream.streams import Streams
from memlong.errors import InvalidArgumentError, MemlongError, SnapshotError
from memlong.plugins import Registry


class SavingDecoder(StreamingDecoder):
    """A decoder whose streams can be saved; parameters and errors are those of `MemoryDecoder`."""

    def save(self, path: str | Path, *, compact: bool = False) -> None:
        """Write the streams into a folder: windows, positions, what they have retrieved, and each row's bank.

        Where they were saved there before, only what has changed is written. The folder holds the state of before or
        this one, whenever the process ends.

        Parameters
        ----------
        path
            A folder, made if it does not exist.
        compact
            Rewrite everything, so that nothing of chunks that have left a bank remains.

        Raises
        ------
        SnapshotError
            If it cannot be written.
        MemlongError
            If nothing has been read yet.
        """
        streams = self._streams
        if streams is None:
            raise MemlongError(
                "There is nothing to save: no text has been read since the decoder was made or reset."
            )
        # After the segment that another thread may be reading, so that window and rows belong together.
        with self._slot.reading, SnapshotWriter(folder_of(path), "decoder") as writer:
            facts = {"fingerprint": self.fingerprint(), "rows": [row.facts() for row in streams.rows]}
            tensors = {name: _own(tensor) for name, tensor in streams.tensors().items()}
            saved = [write_bank(bank, writer, compact=compact) for bank in self.banks]
            file = writer.write("streams", safetensors.torch.save(tensors))
            writer.commit([each.record for each in saved], ExtraRecord(facts, file))
            for bank, each in zip(self.banks, saved, strict=True):
                bank.state.saved = each

    @of_class
    def load(
        cls,
        path: str | Path,
        model: PreTrainedModel,
        tokenizer: Any,
        config: MemoryConfig | None = None,
        *,
        retriever: Retriever | None = None,
        registry: Registry | None = None,
        lazy: bool = False,
        trust_index: bool = False,
        any_model: bool = False,
        most_bytes: int | str | None = None,
    ) -> Self:
        """Make a decoder, and go on with the streams that were saved.

        Parameters
        ----------
        path
            The folder that `save` wrote.
        model, tokenizer, config, retriever, registry
            As for the decoder that was saved. Another backend, other options of it, and another store are fine: keys,
            values and embeddings stay what they are.
        lazy, trust_index, any_model, most_bytes
            As for `restore`.

        Raises
        ------
        SnapshotError
            As `restore` does.
        MemlongError
            As making the decoder does.
        """
        decoder = cls(model, tokenizer, config, retriever=retriever, registry=registry)
        decoder.restore(path, lazy=lazy, trust_index=trust_index, any_model=any_model, most_bytes=most_bytes)
        return decoder

    def restore(
        self,
        path: str | Path,
        *,
        lazy: bool = False,
        trust_index: bool = False,
        any_model: bool = False,
        most_bytes: int | str | None = None,
    ) -> None:
        """Go on with the streams that were saved, in place of those at hand, which are dropped.

        Parameters
        ----------
        path
            The folder that `save` wrote.
        lazy
            Leave the banks' keys and values on disk. Not with ``store``, which says where else they are to be.
        trust_index
            Read the files of index libraries; say this of your own snapshots only. Otherwise indexes are rebuilt.
        any_model
            Take streams of another model, or of other settings. What it makes of their keys and values is another
            question.
        most_bytes
            Refuse a snapshot whose files take more.

        Raises
        ------
        SnapshotError
            If the folder holds no streams, or damaged ones, or those of another model. The decoder is as it was then.
        InvalidArgumentError
            If ``lazy`` is asked for, and the configuration has a ``store``.
        """
        folder = folder_of(path)

        def restored(manifest: Manifest) -> Streams:
            return self._restored(folder, manifest, lazy=lazy, trust_index=trust_index, any_model=any_model)

        streams = open_snapshot(folder, restored, most_bytes)
        with uninterrupted():  # the old streams or the new ones
            self.reset()
            self._streams = streams

    def fingerprint(self) -> dict[str, Any]:
        """Return all that stored keys, values and embeddings depend on, weights as a hash of all."""
        return fingerprint(self.model, self.config, self._layout, self._source, self.gates, self.retriever)

    def _restored(
        self, folder: Path, manifest: Manifest, *, lazy: bool, trust_index: bool, any_model: bool
    ) -> Streams:
        extra = manifest.extra
        if extra is None:
            raise SnapshotError(
                f"{str(folder)!r} holds a bank, and no streams of a decoder: load it with memlong.load_bank, and give "
                "it to reset(banks=[...])."
            )
        self._check_fingerprint(folder, extra, any_model=any_model)
        path = folder / extra.file.name
        try:
            tensors = read_streams(folder, extra.file)
            rows = list(extra.facts["rows"])
            if len(rows) > sum(name.endswith(".recent") for name in tensors):
                raise ValueError(f"{len(rows):,} rows are named, and not all are there")
            if self.config.backend is not None and len(rows) != len(manifest.banks):
                raise damaged(path, f"is of {len(rows)} rows, but there are {len(manifest.banks)} banks")
            for states in tensors.values():
                check_finite(path, states)
            banks = [
                self._bank_of(folder, manifest, row, lazy=lazy, trust_index=trust_index)
                for row in range(len(rows))
            ]
            self._check_fit(path, [bank for bank in banks if bank is not None])
            streams = self._streams_over(banks)
            streams.go_on(rows, tensors)
        except (LookupError, TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, MemlongError):
                raise
            if any_model:
                raise SnapshotError(
                    f"{str(path)!r} holds no streams that this decoder can go on with ({error}). They were saved with "
                    "a model of other shapes or other sizes, or are damaged: any_model=True does not change that."
                ) from error
            raise damaged(path, f"holds no streams of this decoder ({error!r})") from error
        return streams

    def _check_fit(self, path: Path, banks: list[MemoryBank]) -> None:
        try:
            if banks:
                self._checked(banks, any_model=True)  # the fingerprint says more than what the banks know
        except InvalidArgumentError as error:
            raise SnapshotError(
                f"{str(path)!r} comes with banks that this decoder cannot use: {error}"
            ) from error

    def _bank_of(
        self, folder: Path, manifest: Manifest, row: int, *, lazy: bool, trust_index: bool
    ) -> MemoryBank | None:
        if self.config.backend is None:
            return None
        options = dict(self.config.backend_options)
        if self.config.store:
            options["store"] = TieredStore(**self.config.store)
        return self._registry.bank_of(
            read_bank(folder, manifest, row, str(self.model.device)),
            self.config.backend,
            lazy=lazy,
            trust_index=trust_index,
            **options,
        )

    def _check_fingerprint(self, folder: Path, extra: ExtraRecord, *, any_model: bool) -> None:
        theirs = extra.facts.get("fingerprint")
        if not isinstance(theirs, dict):
            raise damaged(folder / extra.file.name, "comes without the fingerprint of its model")
        ours = self.fingerprint()
        odd = [] if any_model else differences(ours, theirs)
        if odd:
            is_dtype = ours["dtype"] != theirs.get("dtype") and theirs.get("dtype") in list(DTYPES)
            raise SnapshotError(
                f"{str(folder)!r} was saved with another model or other settings, for which its keys and values were "
                f"made; what differs: {', '.join(odd)}. Use those, or any_model=True if you know that they fit."
                + (f" To {loading_in(theirs['dtype'])}." if is_dtype else "")
            )


def _own(tensor: Tensor) -> Tensor:
    """Copy: a file may not hold two tensors in one memory, as keys without positions and raw keys are."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
