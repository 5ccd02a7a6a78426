"""MemoryDecoder: gives a transformers model a memory, and streams text of any length through it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from memlong.bank import ChunkLayout, MemoryBank
from memlong.bank.of_class import of_class
from memlong.bank.uncopied import Uncopied
from memlong.decoder.config import MemoryConfig
from memlong.decoder.generation import StreamCache, generate
from memlong.decoder.kv.null_chunk import retrieved_chunks
from memlong.decoder.kv.sources import KvSource
from memlong.decoder.model.adapters import unwrapped
from memlong.decoder.model.attachment import Attachment
from memlong.decoder.model.gates import MemoryGates
from memlong.decoder.model.generate_method import generating_with
from memlong.decoder.model.layer_names import ranges
from memlong.decoder.model.layout import ModelLayout
from memlong.decoder.model.machine import AUTO
from memlong.decoder.persistence.adapter_files import attach_adapter
from memlong.decoder.persistence.fingerprint import fingerprint
from memlong.decoder.persistence.pretrained import load_pretrained_model, read_pretrained, write_pretrained
from memlong.decoder.persistence.snapshot import Reading, read_snapshot, write_snapshot
from memlong.decoder.prepare import prepare
from memlong.decoder.retrievers.base import Retriever
from memlong.decoder.retrievers.query_map import QueryMap
from memlong.decoder.scoring import Likelihood, score
from memlong.decoder.sources import Sources, sources_of
from memlong.decoder.stream.attention_record import AttentionRecord
from memlong.decoder.stream.current import CurrentStreams
from memlong.decoder.stream.retrieval import Choice
from memlong.decoder.stream.segment import Segment, Segments
from memlong.decoder.stream.tokens import token_lists
from memlong.errors import InvalidArgumentError, MemlongError
from memlong.plugins import Registry


class MemoryDecoder(Uncopied):
    """A transformers model with a long-term memory.

    Use it as a context manager: inside the block, the model's attention includes the memory; afterwards the model is
    unchanged. Each row of a batch is a stream of its own with a bank of its own.

    Parameters
    ----------
    model
        A decoder-only transformers model (``memlong models`` lists them) whose attention implementation is ``"sdpa"``
        or ``"eager"``, or peft's ``PeftModel`` around one, whose adapters stay active.
    tokenizer
        Its tokenizer; retrievers that read text need it.
    config
        What to remember and how; see `MemoryConfig`.
    retriever
        A retriever object, instead of the one that ``config`` names.
    registry
        Where names of backends and retrievers are looked up; by default all installed plugins.

    Attributes
    ----------
    model, tokenizer, config
        As passed in; of a ``PeftModel``, the transformers model inside.
    retrieval_layers
        Layers that attend to retrieved chunks.
    retriever
        Embeds chunks and queries; None for the plain window.
    gates
        What each head adds to its logits of memory; None for nothing.

    Raises
    ------
    UnsupportedModelError
        If memory cannot be attached to the model.
    InvalidArgumentError
        If a setting does not fit the model.
    UnknownNameError, MissingDependencyError, PluginError
        If the backend or the retriever is not available.

    Examples
    --------
    >>> with MemoryDecoder(model, tokenizer, MemoryConfig(backend="faiss")) as decoder:  # doctest: +SKIP
    ...     for segment in decoder.stream(tokenizer(text, return_tensors="pt").input_ids):
    ...         segment.logits

    Notes
    -----
    While it is attached, the model is in evaluation mode. Use a decoder from one thread at a time; several decoders,
    each with its own model, may run in separate threads. If a call ends in an error or an interrupt, `tokens_read` says
    how far it came; continuing from there loses nothing.

    The method is MemLong's (arXiv 2408.16967), with each layer's own K-V (training-free) and attention sinks
    (arXiv 2309.17453).
    """

    why_uncopied = (
        "it has a model, and streams that go through it. Save them with save(path), and continue elsewhere with "
        "MemoryDecoder.load(path, model, tokenizer, config)"
    )

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        config: MemoryConfig | None = None,
        *,
        retriever: Retriever | None = None,
        registry: Registry | None = None,
    ) -> None:
        self.model = unwrapped(model)
        self.tokenizer = tokenizer
        self._setup = prepare(self.model, tokenizer, config, retriever, registry)
        self.config: MemoryConfig = self._setup.config
        self.retrieval_layers: tuple[int, ...] = self._setup.retrieval_layers
        self.retriever: Retriever | None = self._setup.retriever
        self.gates: MemoryGates | None = self._setup.gates
        self._attachment = Attachment(self.model, self.model_layout, self.config.adapter_for)
        self._streams = CurrentStreams(self._setup, self._attachment)

    def __enter__(self) -> Self:
        self._attachment.attach()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._attachment.detach()

    def __repr__(self) -> str:
        backend = self.config.as_dict()["backend"]  # without secrets
        told = [f"backend={backend!r}", f"retrieval_layers={ranges(self.retrieval_layers)!r}"]
        if self.config.backend is None:
            told = ["the plain window"]
        if self._streams.batch is not None:
            told += [f"tokens_read={self.tokens_read}", f"chunks={tuple(map(len, self.banks))}"]
        return f"{type(self).__name__}({type(self.model).__name__}, {', '.join(told)})"

    @property
    def is_attached(self) -> bool:
        """Whether the model has this memory: between entering ``with decoder:`` and leaving it."""
        return self._attachment.is_attached

    @property
    def banks(self) -> tuple[MemoryBank, ...]:
        """The bank of each row; before the first token those passed to `reset`, and none without a backend."""
        return self._streams.banks

    def new_bank(self) -> MemoryBank | None:
        """Make an empty bank that fits this decoder, as `reset` makes for each row; None without a backend."""
        return self._setup.new_bank()

    @property
    def registry(self) -> Registry:
        """Where names of backends are looked up."""
        return self._setup.registry

    @property
    def device_kv_bytes(self) -> int:
        """Bytes of keys and values that attention works on (windows and retrieved chunks), without the banks."""
        return self._streams.batch.nbytes if self._streams.batch else 0

    @property
    def tokens_read(self) -> tuple[int, ...]:
        """How many tokens each row's stream has read."""
        return self._streams.tokens_read

    @property
    def model_layout(self) -> ModelLayout:
        """The model's layers, as memory uses them."""
        return self._setup.model_layout

    @property
    def source(self) -> KvSource:
        """What is stored of a chunk, and what each retrieval layer makes of it."""
        return self._setup.source

    @property
    def query_map(self) -> QueryMap | None:
        """Maps the embeddings of queries; None for no map."""
        return self._setup.query_map

    @property
    def retrieved_chunks(self) -> int:
        """How many chunks are retrieved for a segment: ``top_k``, one of which a null chunk takes the place of."""
        return retrieved_chunks(self.config, beside_null_chunk=self.source.null_chunk is not None)

    @property
    def layout(self) -> ChunkLayout:
        """Shape (layers, kv_heads, chunk_size, head_dim), dtype and device of a chunk's keys and of its values."""
        return self._setup.block_layout

    def reset(
        self,
        banks: Sequence[MemoryBank] | None = None,
        *,
        bases: Sequence[MemoryBank] = (),
        choice: Choice | Sequence[Choice] | None = None,
        any_model: bool = False,
    ) -> None:
        """Begin new streams, with empty windows.

        Parameters
        ----------
        banks
            A bank for each row, for instance one that already holds another text, read by the same model with the same
            ``retrieval_layers``; new ones by default.
        bases
            Banks that all rows read and none changes, such as ``load_bank(folder, lazy=True)``: each row's new bank
            lies over them (`LayeredBank`). Not with ``banks``.
        choice
            Chooses chunks in place of the retriever, as training does: for all rows, or one for each. It is kept by
            `flush`, until the next `reset`; `generate`, `score` and `preview` retrieve without it.
        any_model
            Accept banks that another model filled, or this one with other settings, if shapes fit. Whether this model
            can use their keys and values is not checked.

        Raises
        ------
        InvalidArgumentError
            If a bank does not fit the retriever, the model or the settings, two rows would share one, or ``choice``
            cannot choose.
        """
        self._streams.reset(banks, bases=bases, choice=choice, any_model=any_model)

    def use_banks(self, banks: Sequence[MemoryBank], *, any_model: bool = False) -> None:
        """Continue with other banks, from the next retrieval on; windows stay.

        Parameters
        ----------
        banks
            One for each row, as for `reset`.
        any_model
            As for `reset`.

        Raises
        ------
        InvalidArgumentError
            If a bank does not fit, two rows would share one, or the number of banks is not that of rows.
        """
        self._streams.use_banks(banks, any_model=any_model)

    def flush(self) -> list[list[int]]:
        """Store what the windows still hold, and begin new streams over the same banks.

        Afterwards a bank is useful without its decoder, for instance in a `BankPool`.

        Returns
        -------
        list of lists of int
            For each row, the latest tokens, fewer than a chunk, that no bank holds: read them before what comes next.
            The first ``sink_tokens`` of a stream are in no bank either.

        Raises
        ------
        MemlongError
            If the configuration has ``backend=None``: there are no banks.
        """
        if self.config.backend is None:
            raise MemlongError("There is no bank to store the window in: the configuration has backend=None")
        return self._streams.flush()

    def stream(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        queries: Sequence[Sequence[int] | None] | None = None,
        logits: Literal["all", "last"] = "all",
        gradients: bool = False,
    ) -> Segments:
        """Run the model over text, segment by segment; a later call continues where this one ended.

        Segments begin at multiples of ``segment_size`` in the stream, however the text is split into calls, so that the
        same text always meets the same memory.

        Parameters
        ----------
        input_ids
            [rows, tokens], int64.
        attention_mask
            [rows, tokens]; 0 where padded, which may be anywhere.
        queries
            For each row, the token ids to retrieve with next, or None for the latest text. Unless ``focus_tokens`` is
            0, they ask for what few chunks hold, as those of an answer do, but with all of their tokens.
        logits
            ``"all"``, or only those of the ``"last"`` token of each forward call, which is faster.
        gradients
            Whether each forward call records gradients, back to what made the memory that it retrieved (latent maps,
            gates). The window and stored memory of earlier segments are constants: truncated backpropagation.

        Returns
        -------
        Segments
            An iterator over a `Segment` for each forward call; its length is how many remain.

        Raises
        ------
        InvalidArgumentError
            If shapes, token ids or the number of rows are wrong.
        MemlongError
            If the decoder is not attached, or was reset before the last segment.
        """
        if logits not in ("all", "last"):
            raise InvalidArgumentError(f"logits must be 'all' or 'last', got {logits!r}")
        pending = token_lists(input_ids, attention_mask, self.model_layout)
        return self._streams.read(pending, 0 if logits == "all" else 1, queries=queries, gradients=gradients)

    def preview(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        queries: Sequence[Sequence[int] | None] | None = None,
        choice: Choice | Sequence[Choice] | None = None,
        gradients: bool = False,
    ) -> Segment:
        """Run the model over text as `stream` would, but leave streams and banks as they are.

        Parameters
        ----------
        input_ids, attention_mask, queries
            As for `stream`, at most what is left of a segment. After a single stream, any number of rows may follow it.
        choice
            Chooses chunks in place of the retriever, for instance to compare what they give: for all rows, or one for
            each.
        gradients
            As for `stream`.

        Raises
        ------
        InvalidArgumentError
            If there are no tokens or too many, or as for `stream`.
        MemlongError
            If the decoder is not attached.
        """
        pending = token_lists(input_ids, attention_mask, self.model_layout)
        return self._streams.preview(pending, queries, choice, gradients=gradients)

    def read(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Read text, and return the logits [rows, vocabulary] after each row's last token.

        Raises
        ------
        InvalidArgumentError
            If a row holds no token, or as for `stream`.
        """
        pending = token_lists(input_ids, attention_mask, self.model_layout)
        if not all(pending):
            raise InvalidArgumentError(
                "input_ids must hold at least one token in every row, got an empty row"
            )
        last: Tensor | None = None
        for segment in self._streams.read(pending, 1, gradients=False):
            fresh = segment.logits[:, -1]
            has_token = segment.tokens[:, -1:].to(fresh.device) >= 0
            last = fresh if last is None else torch.where(has_token, fresh, last)
        return cast("Tensor", last)

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        remember: bool = True,
        past_key_values: StreamCache | None = None,
        **options: Any,
    ) -> Any:
        """Read a prompt and continue it, as the model's ``generate()`` does, with everything read before in memory.

        Memory is retrieved at the end of the prompt and after every ``retrieve_every`` generated tokens. The last
        tokens of the prompt, at most a segment, are read again with it, so that a question is understood in the light
        of its answer. Chunks that leave the window are stored as usual.

        Parameters
        ----------
        input_ids
            [rows, tokens], int64: the prompt of each stream, of any length. It follows what was read before.
        attention_mask
            [rows, tokens]; 0 where padded, on the left.
        remember
            Whether the streams continue after the prompt and its answer (the first returned, of several), or stay
            where they are now, so that the next prompt does not know of this one; then a single stream serves any
            number of prompts, side by side. Pass a long text to `read` first: what an unremembered prompt adds to
            memory stays on the device.
        past_key_values
            What an earlier call returned in its dict: then ``input_ids`` is the whole conversation, as in transformers,
            and only what is new is read.
        options
            Options of the model's ``generate()``: greedy, sampling and beam search, streamers, logits processors and
            stopping criteria.

        Returns
        -------
        Tensor or ModelOutput
            What the model's ``generate()`` returns: prompt and answer.

        Raises
        ------
        InvalidArgumentError
            If shapes, token ids or the number of rows are wrong, or an option does not work with a memory. Nothing is
            read before transformers has accepted the options.
        MemlongError
            If the decoder is not attached.
        """
        self._attachment.check()
        return generate(
            self._setup, self._streams, input_ids, attention_mask, past_key_values, options, remember=remember
        )

    def score(
        self, input_ids: Tensor, continuations: Sequence[Tensor | Sequence[int]], *, rows: int = 8
    ) -> list[Likelihood]:
        """Return how likely each of several continuations of a prompt is, with everything read before in memory.

        As if `generate` had said them with ``remember=False``: memory is retrieved at the end of the prompt and after
        every ``retrieve_every`` tokens, and the streams stay where they are.

        Parameters
        ----------
        input_ids
            [1, tokens], int64: the prompt, which follows what was read before.
        continuations
            Token ids [tokens] of each.
        rows
            Continuations that go through the model side by side.

        Raises
        ------
        InvalidArgumentError
            If a shape or a token id is wrong, or several rows have been read.
        MemlongError
            If the decoder is not attached.
        """
        self._attachment.check()
        return score(self._setup, self._streams, input_ids, continuations, rows)

    @contextmanager
    def sources(self) -> Iterator[Sources]:
        """Record which retrieved chunks tokens attend to, and how much, while the block is open.

        What counts of `generate` is the answer: each token from which a token is chosen, that is the last of the
        prompt, as it is read again with memory, and each generated token but the last. The rest of the prompt does not
        count, nor a sequence that has ended; all sequences and beams of a row count alike. `score` counts in the same
        way, all continuations together. Of `stream` and `read`, all tokens that are read inside the block count. No
        token changes: logits are those without recording.

        Yields
        ------
        Sources
            What has been recorded so far; it remains when the block is left.

        Raises
        ------
        MemlongError
            If the decoder is not attached, or a block is open already.
        UnsupportedModelError
            While text is read, if the model's attention is more than a softmax of products, and does not return its
            weights.

        Examples
        --------
        >>> with decoder.sources() as sources:  # doctest: +SKIP
        ...     output = decoder.generate(question, max_new_tokens=50)
        >>> sources.chunks[0].span  # doctest: +SKIP
        (1540, 1668)
        """
        self._attachment.check()
        slot = self._attachment.slot
        if slot.record is not None:
            raise MemlongError(
                "The decoder records sources already: leave that `with decoder.sources():` block first, or use what it "
                "has recorded"
            )
        record = slot.record = AttentionRecord(self.retrieval_layers, self.config.chunk_size)
        try:
            yield Sources(partial(sources_of, record))
        finally:
            slot.record = None

    def replacing_generate(self) -> AbstractContextManager[None]:
        """Let the model's ``generate()`` be this decoder's, for callers such as ``transformers.pipeline``.

        Each call knows what was read before, and nothing of other calls (``remember=False``).
        """
        return generating_with(self.model, partial(self.generate, remember=False))

    def save(self, path: str | Path, *, compact: bool = False) -> None:
        """Write the streams into a folder: windows, positions, what they have retrieved, and each row's bank.

        If the folder already holds an earlier state, only what has changed is written. Whenever the process ends, the
        folder holds the earlier state or this one.

        Parameters
        ----------
        path
            A folder, created if it does not exist.
        compact
            Rewrite everything, so that nothing remains of chunks that have left a bank.

        Raises
        ------
        SnapshotError
            If it cannot be written.
        MemlongError
            If nothing has been read yet.
        """
        # After the segment that another thread may be reading, so that window and rows match.
        with self._attachment.slot.reading:
            write_snapshot(path, self._setup, self._streams, compact=compact)

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
        bases: Sequence[MemoryBank] = (),
        any_bases: bool = False,
    ) -> Self:
        """Make a decoder, and continue the streams that were saved.

        Parameters
        ----------
        path
            The folder that `save` wrote.
        model, tokenizer, config, retriever, registry
            As for the decoder that was saved. The backend, its options and the store may differ: keys, values and
            embeddings stay what they are.
        lazy, trust_index, any_model, most_bytes, bases, any_bases
            As for `restore`.

        Raises
        ------
        SnapshotError
            As for `restore`.
        MemlongError
            As for making the decoder.
        """
        decoder = cls(model, tokenizer, config, retriever=retriever, registry=registry)
        decoder.restore(
            path,
            lazy=lazy,
            trust_index=trust_index,
            any_model=any_model,
            most_bytes=most_bytes,
            bases=bases,
            any_bases=any_bases,
        )
        return decoder

    def restore(
        self,
        path: str | Path,
        *,
        lazy: bool = False,
        trust_index: bool = False,
        any_model: bool = False,
        most_bytes: int | str | None = None,
        bases: Sequence[MemoryBank] = (),
        any_bases: bool = False,
    ) -> None:
        """Continue the streams that were saved, in place of the current ones, which are dropped.

        Parameters
        ----------
        path
            The folder that `save` wrote.
        lazy
            Leave the banks' keys and values on disk. Not with ``store``, which says where else to keep them.
        trust_index
            Read the files of index libraries; use it for your own snapshots only. Otherwise indexes are rebuilt.
        any_model
            Accept streams of another model, or of other settings. Whether this model can use their keys and values is
            not checked.
        most_bytes
            Refuse a snapshot whose files take more.
        bases
            The read-only banks that each row's bank lay over, in their order, whatever they hold by now, or some to put
            them over. Retrieved chunks that they no longer hold are dropped.
        any_bases
            Accept other bases than those, or none. All chunks of those can be found.

        Raises
        ------
        SnapshotError
            If the folder holds no streams, or damaged ones, or those of another model, or over other bases. The decoder
            is then unchanged.
        InvalidArgumentError
            If ``lazy`` is requested, and the configuration has a ``store``.
        """
        reading = Reading(lazy, trust_index, any_model, most_bytes, bases, any_bases)
        self._streams.replace(read_snapshot(path, self._setup, self._streams, reading))

    def fingerprint(self) -> dict[str, Any]:
        """Return everything that stored keys, values and embeddings depend on, with one hash of all weights."""
        return fingerprint(self._setup)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        model: PreTrainedModel | None = None,
        tokenizer: Any = None,
        *,
        changes: Mapping[str, Any] | None = None,
        retriever: Retriever | None = None,
        registry: Registry | None = None,
        dtype: str = AUTO,
        device: str = AUTO,
        trust_remote_code: bool = False,
    ) -> Self:
        """Load a trained decoder: its model, the adapter, and what reads the memory.

        Parameters
        ----------
        name
            A folder that `save_pretrained` or ``memlong train`` wrote, or a hub id.
        model, tokenizer
            The model that it was trained for, and its tokenizer, if already loaded. The adapter is added to the model.
        changes
            Settings that may differ from those of the training: ``backend``, ``backend_options``, ``retriever``,
            ``retriever_options``, ``query_map``, ``store``, ``top_k``, ``answer_cutoff`` and ``retrieve_for``.
        retriever, registry
            As for `MemoryDecoder`.
        dtype, device
            Dtype and device of the model if it is loaded, as for `load_model`; but ``"auto"`` is the dtype of the
            training if the folder names it.
        trust_remote_code
            Whether code that the model brings may run, as for `load_model`. The decoder's own folder holds no code.

        Raises
        ------
        InvalidArgumentError
            If the folder holds no decoder, or one for another model.
        MissingDependencyError
            If peft is not installed, or the model needs a package that is not.
        """
        found = read_pretrained(name, changes, registry)
        if model is None:
            model, tokenizer = load_pretrained_model(
                name, found, dtype=dtype, device=device, trust_remote_code=trust_remote_code
            )
        # Before the adapter is added: a retriever that uses the model is then the one of the training.
        decoder = cls(model, tokenizer, found.config, retriever=retriever, registry=registry)
        if found.has_adapter:
            attach_adapter(model, found.folder, found.base_weights)
        return decoder

    def save_pretrained(
        self, folder: str | Path, *, base_model: str | None = None, training: Mapping[str, Any] | None = None
    ) -> None:
        """Write what was trained into a folder, for `from_pretrained`: adapter, maps, gates and settings.

        Parameters
        ----------
        folder
            Created if it does not exist.
        base_model
            The name under which `load_model` finds the model; by default, where transformers loaded it from.
        training
            Settings of the training, to be recorded.

        Raises
        ------
        StorageError
            If it cannot be written.
        """
        write_pretrained(folder, self._setup, base_model=base_model, training=training)
