"""MemoryDecoder: gives a transformers model a memory, and streams text of any length through it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from memlong.bank import ChunkLayout, MemoryBank, TieredStore
from memlong.decoder.attention import AttentionSlot, check_free, evaluating, installed, replaced_attention
from memlong.decoder.banks import check_banks
from memlong.decoder.config import MemoryConfig, parse_layers
from memlong.decoder.gates import make_gates
from memlong.decoder.generation import Speaker, StreamCache, answers_of, check_options
from memlong.decoder.loading import load_model
from memlong.decoder.placement import check_positions, check_sight
from memlong.decoder.pretrained import attach_adapter, read_pretrained, write_pretrained
from memlong.decoder.probe import ModelLayout, probe
from memlong.decoder.recall import RandomChunks
from memlong.decoder.retrievers.base import Retriever
from memlong.decoder.retrievers.create import create_retriever
from memlong.decoder.sources import KvSource, LatentSource, make_source
from memlong.decoder.streams import Segment, Streams
from memlong.decoder.tokens import token_lists
from memlong.errors import InvalidArgumentError, MemlongError
from memlong.plugins import Registry
from memlong.plugins.options import check_options as check_store_options


class MemoryDecoder:
    """A transformers model with a long-term memory.

    Use it as a context manager: inside, the model's attention goes through memlong; afterwards the model is what it
    was. Each row of a batch is a stream of its own with a bank of its own.

    Parameters
    ----------
    model
        A RoPE decoder-only model of transformers, its attention implementation ``"sdpa"`` or ``"eager"``.
    tokenizer
        Its tokenizer; retrievers that read text need it.
    config
        What to remember and how; see :class:`MemoryConfig`.
    retriever
        A retriever at hand, instead of the one that ``config`` names.
    registry
        Where names of backends and retrievers are looked up; by default all installed plugins.

    Raises
    ------
    UnsupportedModelError
        If memory cannot be attached to the model.
    InvalidArgumentError
        If a setting does not fit the model.
    UnknownNameError, MissingDependencyError, PluginError
        If the backend or the retriever cannot be had.

    Examples
    --------
    >>> with MemoryDecoder(model, tokenizer, MemoryConfig(backend="faiss")) as decoder:  # doctest: +SKIP
    ...     for segment in decoder.stream(tokenizer(text, return_tensors="pt").input_ids):
    ...         segment.logits

    Notes
    -----
    While it is attached, the model is in evaluation mode. A decoder serves one thread at a time; several decoders, each
    with a model of its own, may work in threads of their own. Where a call ends in an error or an interrupt,
    :attr:`tokens_read` tells how far it came; going on from there loses nothing.

    The method is MemLong's (arXiv 2408.16967), with K-V of each layer's own (training-free) and attention sinks
    (arXiv 2309.17453).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        config: MemoryConfig | None = None,
        *,
        retriever: Retriever | None = None,
        registry: Registry | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.config = MemoryConfig() if config is None else config
        if not isinstance(self.config, MemoryConfig):
            raise InvalidArgumentError(f"config is {config!r}; expected a MemoryConfig.")
        if retriever is not None and not isinstance(retriever, Retriever):
            raise InvalidArgumentError(
                f"retriever is {retriever!r}; expected a Retriever. Its name goes into the MemoryConfig."
            )
        self._layout = probe(model)
        check_positions(self.config, self._layout)
        self.retrieval_layers = parse_layers(
            self.config.retrieval_layers, self._layout.full_attention_layers, len(self._layout.layers)
        )
        check_sight(self.config, self._layout, self.retrieval_layers)
        like = cast("Tensor", model.get_input_embeddings().weight)
        self._source = make_source(self.config, self._layout, self.retrieval_layers, like)
        self.gates = make_gates(self.config, self._layout.layers[0].heads, self.retrieval_layers, like)
        self._registry = registry or Registry()
        self.retriever = retriever
        if self.config.backend is not None:
            self._registry.load_backend_class(self.config.backend)  # say now what cannot be had
            if self.config.store:
                check_store_options("store", TieredStore, self.config.store)
                TieredStore(**self.config.store).check_device(model.device)
            if retriever is None:
                self.retriever = create_retriever(
                    self.config.retriever, model, tokenizer, self.config.retriever_options, self._registry
                )
            bank = self._new_bank()  # the options of a backend and its capacity, too
            if bank is not None:
                bank.check_layout(self.layout)
        self._slot = AttentionSlot()
        self._attached = ExitStack()
        self._is_attached = False
        self.reset()

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
        dtype: str = "bfloat16",
        device: str = "cpu",
    ) -> Self:
        """Load a trained decoder: its model, the adapter, and what reads the memory.

        Parameters
        ----------
        name
            A folder that :meth:`save_pretrained` or ``memlong train`` wrote, or a hub id.
        model, tokenizer
            The model that it was trained for, and its tokenizer, if they are at hand. The model gets the adapter.
        changes
            Settings that may be others than those of the training: ``backend``, ``backend_options``, ``retriever``,
            ``retriever_options`` and ``store``.
        retriever, registry
            As for :class:`MemoryDecoder`.
        dtype, device
            Of the model, if it is to be loaded.

        Raises
        ------
        InvalidArgumentError
            If the folder holds no decoder, or one for another model.
        MissingDependencyError
            If peft is not installed, or the model needs a package that is not.
        """
        found = read_pretrained(name, changes)
        if model is None:
            if found.base_model is None:
                raise InvalidArgumentError(
                    f"{str(name)!r} does not say for which model it was trained: give `model` and `tokenizer`."
                )
            model, tokenizer = load_model(found.base_model, dtype=dtype, device=device)
        # Before the adapter: a retriever that asks the model is then the one of the training.
        decoder = cls(model, tokenizer, found.config, retriever=retriever, registry=registry)
        if found.has_adapter:
            attach_adapter(model, found.folder)
        return decoder

    def save_pretrained(
        self, folder: str | Path, *, base_model: str | None = None, training: Mapping[str, Any] | None = None
    ) -> None:
        """Write what was trained into a folder, for :meth:`from_pretrained`: adapter, maps, gates and settings.

        Parameters
        ----------
        folder
            Made if it does not exist.
        base_model
            Under which name :func:`~memlong.load_model` finds the model; by default, where transformers loaded it from.
        training
            Settings of the training, to be noted down.

        Raises
        ------
        StorageError
            If it cannot be written.
        """
        maps = self._source.maps if isinstance(self._source, LatentSource) else None
        write_pretrained(
            folder, self.model, self.config, maps, self.gates, base_model=base_model, training=training
        )

    def __enter__(self) -> Self:
        check_free(self.model)
        with ExitStack() as stack:
            stack.enter_context(evaluating(self.model))
            stack.enter_context(installed(self._slot, self._layout.modules))
            stack.enter_context(replaced_attention(self.model))
            self._attached = stack.pop_all()
        self._is_attached = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_attached = False
        self._attached.close()

    @property
    def banks(self) -> tuple[MemoryBank, ...]:
        """The bank of each row; none before the first token, or without a backend."""
        rows = self._streams.rows if self._streams else ()
        return tuple(row.bank for row in rows if isinstance(row.bank, MemoryBank))

    @property
    def device_kv_bytes(self) -> int:
        """Bytes of keys and values that attention works on, windows and what is retrieved; the banks' own apart."""
        return self._streams.nbytes if self._streams else 0

    @property
    def tokens_read(self) -> tuple[int, ...]:
        """How many tokens each row's stream has read."""
        return tuple(row.seen for row in self._streams.rows) if self._streams else ()

    @property
    def model_layout(self) -> ModelLayout:
        """What the model is made of, layer by layer."""
        return self._layout

    @property
    def source(self) -> KvSource:
        """What is stored of a chunk, and what each retrieval layer makes of it."""
        return self._source

    @property
    def layout(self) -> ChunkLayout:
        """Shape (layers, kv_heads, chunk_size, head_dim), dtype and device of a chunk's keys and of its values."""
        return self._source.block_layout(self.config.chunk_size, self.model.dtype, self.model.device)

    def reset(
        self, banks: Sequence[MemoryBank] | None = None, *, random_chunks: RandomChunks | None = None
    ) -> None:
        """Begin new streams, with empty windows.

        Parameters
        ----------
        banks
            A bank for each row, for instance one that already holds another text, which the same model read with the
            same ``retrieval_layers``; new ones by default.
        random_chunks
            Now and then, chunks at random instead of those that were asked for, as training uses them.

        Raises
        ------
        InvalidArgumentError
            If a bank does not fit the retriever, the model or the settings, or two rows would share one.
        """
        self._given_banks = None if banks is None else self._checked(banks)
        self._random_chunks = random_chunks
        self._streams: Streams | None = None
        self._call = object()  # the latest call that reads; those before it have ended
        self._turn: tuple[StreamCache, tuple[int, ...]] | None = None

    def use_banks(self, banks: Sequence[MemoryBank]) -> None:
        """Let the streams go on with other banks, from the next retrieval; their windows stay.

        Parameters
        ----------
        banks
            One for each row, as :meth:`reset` takes them.

        Raises
        ------
        InvalidArgumentError
            If a bank does not fit, two rows would share one, or there are not as many as rows.
        """
        given = self._checked(banks)
        rows = self._streams.rows if self._streams else ()
        if len(given) != len(rows):
            raise InvalidArgumentError(
                f"banks holds {len(given)} banks for {len(rows)} rows; expected one for each row that streams."
            )
        for row, bank in zip(rows, given, strict=True):
            row.bank = bank

    def stream(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        logits: Literal["all", "last"] = "all",
        gradients: bool = False,
    ) -> Iterator[Segment]:
        """Send text through the model, segment by segment; a later call goes on where this one ended.

        Segments begin at multiples of ``segment_size`` in the stream, however the text is cut into calls, so that the
        same text always meets the same memory.

        Parameters
        ----------
        input_ids
            [rows, tokens], int64.
        attention_mask
            [rows, tokens]; 0 where padded, which may be anywhere.
        logits
            ``"all"``, or only the ``"last"`` token's of each forward call, which saves time when reading in.
        gradients
            Whether each forward call records gradients, back to what made the memory that it retrieved (latent maps,
            gates). The window and stored memory of earlier segments are constants: truncated backpropagation.

        Yields
        ------
        Segment
            One for each forward call.

        Raises
        ------
        InvalidArgumentError
            If shapes, token ids or the number of rows are wrong.
        MemlongError
            If the decoder is not attached, or was reset while this call was under way.
        """
        if logits not in ("all", "last"):
            raise InvalidArgumentError(f"logits is {logits!r}; expected 'all' or 'last'.")
        pending = token_lists(input_ids, attention_mask, self._layout.vocabulary)
        self._streams = self._streams_for(len(pending))
        self._call = object()
        return self._segments(self._streams, pending, 0 if logits == "all" else 1, gradients=gradients)

    def read(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Read text in, and return the logits [rows, vocabulary] that follow each row's last token.

        Raises
        ------
        InvalidArgumentError
            If a row holds no token, or as :meth:`stream` does.
        """
        if not all(token_lists(input_ids, attention_mask, self._layout.vocabulary)):
            raise InvalidArgumentError(
                "A row of input_ids holds no token; expected at least one in every row."
            )
        last: Tensor | None = None
        for segment in self.stream(input_ids, attention_mask, logits="last"):
            fresh = segment.logits[:, -1]
            spoke = segment.tokens[:, -1:].to(fresh.device) >= 0
            last = fresh if last is None else torch.where(spoke, fresh, last)
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
        """Read a prompt and continue it, as the model's ``generate()`` does, with all that was read before in memory.

        At the end of the prompt, and every ``retrieve_every`` tokens that follow, what the text at hand calls for is
        retrieved; the last tokens of the prompt, a segment's at most, are read again with it, so that a question is
        understood in the light of its answer. Chunks that leave the window meanwhile are in memory, too.

        Parameters
        ----------
        input_ids
            [rows, tokens], int64: the prompt of each stream, of any length. It follows what was read before.
        attention_mask
            [rows, tokens]; 0 where padded, on the left.
        remember
            Whether the streams go on from the prompt and its answer (of several, the first returned), or from
            where they are now, so that the next prompt does not know of this one; a single stream then serves any
            number of prompts, side by side. A long text is better given to :meth:`read` first: what a prompt adds to
            memory without being remembered stays on the device.
        past_key_values
            What an earlier call returned in its dict: then ``input_ids`` is the whole conversation, as transformers has
            it, and only what is new is read.
        options
            Of the model's ``generate()``: greedy, sampling and beam search, streamers, logits processors and stopping
            criteria.

        Returns
        -------
        Tensor or ModelOutput
            What the model's ``generate()`` returns: prompt and answer.

        Raises
        ------
        InvalidArgumentError
            If shapes, token ids or the number of rows are wrong, or an option does not go with a memory. Nothing is
            read before transformers has accepted the options.
        MemlongError
            If the decoder is not attached.
        """
        self._check_attached()
        check_options(self.model, options)
        token_lists(input_ids, attention_mask, self._layout.vocabulary)  # before anything is cut
        known = 0 if past_key_values is None else self._columns_of(past_key_values)
        new_mask = None if attention_mask is None else attention_mask[:, known:]
        prompt = token_lists(input_ids[:, known:], new_mask, self._layout.vocabulary)
        if not all(prompt) or (new_mask is not None and not bool(new_mask[:, -1].all())):
            raise InvalidArgumentError(
                "A row of the prompt is empty, or padded on the right; expected at least one token in every row, and "
                "padding on the left: tokenizer.padding_side = 'left'."
            )
        streams = self._streams_for(len(prompt)) if remember else self._forked(len(prompt))

        def read_prompt() -> None:  # when the options have been found good
            if remember:
                self._streams, self._call = streams, object()
            streams.finish(prompt, self._slot)

        speaker = Speaker(streams, self._slot, read_prompt, input_ids.shape[1], self.config)
        with speaker.attached(self.model):
            plain: Any = type(self.model)
            output = plain.generate(
                self.model,
                input_ids,
                attention_mask=attention_mask,
                past_key_values=speaker.cache,
                **options,
            )
        if remember:
            # Read as any text is: what the streams hold must not depend on beams, or on the rows beside them.
            sequences = output if isinstance(output, Tensor) else output.sequences
            streams.finish(
                answers_of(self.model, sequences, input_ids.shape[1], len(prompt), options), self._slot
            )
            speaker.cache.columns = sequences.shape[1]
            self._turn = (speaker.cache, self.tokens_read)
        return output

    @contextmanager
    def replacing_generate(self) -> Iterator[None]:
        """Let the model's ``generate()`` be this decoder's, for callers such as ``transformers.pipeline``.

        Every call knows what was read in before, and nothing of another call (``remember=False``).
        """
        before = vars(self.model).get("generate")

        def generate(inputs: Tensor | None = None, generation_config: Any = None, **options: Any) -> Any:
            input_ids = options.pop("input_ids", inputs)
            return self.generate(input_ids, remember=False, generation_config=generation_config, **options)

        setattr(self.model, "generate", generate)  # noqa: B010 - seen by mypy as a submodule
        try:
            yield
        finally:
            if before is None:
                del self.model.generate
            else:
                setattr(self.model, "generate", before)  # noqa: B010

    def _segments(
        self, streams: Streams, pending: list[list[int]], logits_to_keep: int, *, gradients: bool
    ) -> Iterator[Segment]:
        segments = streams.read(pending, self._slot, logits_to_keep, gradients=gradients)
        call = self._call
        while True:
            self._check_attached()
            if call is not self._call:
                raise MemlongError(
                    "This call of stream() has ended: reset(), generate() or another stream() came before its last "
                    "segment. What it had not read yet is not in the stream."
                )
            segment = next(segments, None)
            if segment is None:
                return
            yield segment

    def _check_attached(self) -> None:
        if not self._is_attached:
            raise MemlongError(
                "The decoder is not attached to its model: stream and generate inside `with decoder:`."
            )

    def _columns_of(self, cache: StreamCache) -> int:
        if self._turn is None or self._turn[0] is not cache or self._turn[1] != self.tokens_read:
            raise InvalidArgumentError(
                "past_key_values is not what this decoder's latest generate() returned, or the streams have read on "
                "since: pass only the new text, which the streams continue with, and leave past_key_values out."
            )
        return cache.columns

    def _streams_for(self, rows: int) -> Streams:
        if self._streams is None:
            return self._begin(rows)
        if rows != len(self._streams.rows):
            raise InvalidArgumentError(
                f"input_ids has {rows} rows, but the streams so far have {len(self._streams.rows)}; "
                "call reset() to begin new ones."
            )
        return self._streams

    def _forked(self, rows: int) -> Streams:
        """Streams that will be dropped: one for each row, or all from a single one."""
        if self._streams is not None and len(self._streams.rows) == 1:
            return self._streams.fork([0] * rows)
        return self._streams_for(rows).fork(range(rows))

    def _begin(self, rows: int) -> Streams:
        given = self._given_banks
        if given is not None and len(given) != rows:
            raise InvalidArgumentError(
                f"banks holds {len(given)} banks for {rows} rows; expected one for each row."
            )
        banks = given or [self._new_bank() for _ in range(rows)]
        return Streams(
            self.model,
            self._layout,
            self.config,
            self.retriever,
            self._source,
            banks,
            self.gates,
            self._random_chunks,
        )

    def _new_bank(self) -> MemoryBank | None:
        if self.config.backend is None or self.retriever is None:
            return None
        options = {"metric": self.retriever.metric, **self.config.backend_options}
        if self.config.store:
            options["store"] = TieredStore(**self.config.store)
        return self._registry.create_bank(self.config.backend, self.retriever.dim, **options)

    def _checked(self, banks: Sequence[MemoryBank]) -> tuple[MemoryBank, ...]:
        if self.retriever is None or self.config.backend is None:
            raise InvalidArgumentError(
                "banks were given, but the configuration has backend=None: name a backend."
            )
        return check_banks(banks, self.retriever, self.layout)
