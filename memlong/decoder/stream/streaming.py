"""StreamingDecoder: lets text of any length go through a transformers model over a memory.

What it is for, and how it is used, `MemoryDecoder` says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from memlong.bank import ChunkLayout, MemoryBank, TieredStore
from memlong.bank.uncopied import Uncopied
from memlong.decoder.config import MemoryConfig
from memlong.decoder.generation import plain_generate_told
from memlong.decoder.interrupts import uninterrupted
from memlong.decoder.kv.sources import KvSource, make_source
from memlong.decoder.model.adapters import unwrapped
from memlong.decoder.model.attention import (
    AttentionSlot,
    check_free,
    evaluating,
    installed,
    replaced_attention,
)
from memlong.decoder.model.gates import make_gates
from memlong.decoder.model.layer_names import parse_layers, ranges
from memlong.decoder.model.layout import ModelLayout
from memlong.decoder.model.probe import probe
from memlong.decoder.model.trial import try_out
from memlong.decoder.persistence.fingerprint import origin_of
from memlong.decoder.retrievers.base import Retriever
from memlong.decoder.retrievers.create import check_made_for, create_retriever
from memlong.decoder.stream.banks import check_banks, check_origins
from memlong.decoder.stream.placement import with_positions
from memlong.decoder.stream.recall import RandomChunks
from memlong.decoder.stream.streams import Segment, Streams
from memlong.decoder.stream.tokens import token_lists
from memlong.errors import InvalidArgumentError, MemlongError
from memlong.plugins import Registry
from memlong.plugins.options import check_options
from memlong.plugins.registry import installed_registry


class Segments(Iterator[Segment]):
    """Segments that are read as they are asked for; ``len()`` is how many are to come."""

    def __init__(self, segments: Iterator[Segment], count: int) -> None:
        self._segments, self._left = segments, count

    def __next__(self) -> Segment:
        segment = next(self._segments)
        self._left -= 1
        return segment

    def __len__(self) -> int:
        return self._left


class StreamingDecoder(Uncopied):
    """A model, its streams and their memory: attaching, reading and detaching.

    Parameters and errors are those of `MemoryDecoder`.
    """

    why_uncopied = (
        "it has a model, and streams that go through it. Write them with save(path), and go on elsewhere with "
        "MemoryDecoder.load(path, model, tokenizer, config)."
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
        self.model = model = unwrapped(model)
        self.tokenizer = tokenizer
        self.config = MemoryConfig() if config is None else config
        if not isinstance(self.config, MemoryConfig):
            raise InvalidArgumentError(f"config is {config!r}; expected a MemoryConfig.")
        if isinstance(tokenizer, MemoryConfig | Retriever | str):
            raise InvalidArgumentError(
                f"tokenizer is {tokenizer!r:.80}; expected the model's tokenizer, or None, before the config."
            )
        if retriever is not None and not isinstance(retriever, Retriever):
            raise InvalidArgumentError(
                f"retriever is {retriever!r}; expected a Retriever. Its name goes into the MemoryConfig."
            )
        check_made_for(retriever, model)
        self._registry = registry or installed_registry()
        self._layout = probe(model)
        if self._layout.is_unusual:
            try_out(model, self._layout, self._registry)
        self.retrieval_layers = parse_layers(
            str(self.config.retrieval_layers), self._layout.full_attention_layers, self._layout.layers
        )
        self.config = with_positions(self.config, self._layout, self.retrieval_layers)
        like = cast("Tensor", model.get_input_embeddings().weight)
        self._source = make_source(self.config, self._layout, self.retrieval_layers, like)
        self.gates = make_gates(self.config, self._layout, self.retrieval_layers, like)
        self.retriever = retriever
        if self.config.backend is not None:
            self._registry.load_backend_class(self.config.backend)  # say now what is missing
            if self.config.store:
                check_options("store", TieredStore, self.config.store)
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

    def __enter__(self) -> Self:
        check_free(self.model)
        try:
            with uninterrupted(), ExitStack() as stack:
                stack.enter_context(evaluating(self.model))
                stack.enter_context(installed(self._slot, self._layout.modules))
                stack.enter_context(replaced_attention(self.model))
                stack.enter_context(plain_generate_told(self.model))
                self._attached = stack.pop_all()
                self._is_attached = True
        except BaseException:  # a Ctrl-C that has waited, too: what is not entered is not left
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with uninterrupted():
            self._is_attached = False
            self._attached.close()

    def __repr__(self) -> str:
        backend = self.config.as_dict()["backend"]  # without what is secret
        told = [f"backend={backend!r}", f"retrieval_layers={ranges(self.retrieval_layers)!r}"]
        if self.config.backend is None:
            told = ["the plain window"]
        if self._streams is not None:
            told += [f"tokens_read={self.tokens_read}", f"chunks={tuple(map(len, self.banks))}"]
        return f"{type(self).__name__}({type(self.model).__name__}, {', '.join(told)})"

    @property
    def banks(self) -> tuple[MemoryBank, ...]:
        """The bank of each row; before the first token those that were given, and none without a backend."""
        if self._streams is None:
            return self._given_banks or ()
        rows = self._streams.rows
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
        self,
        banks: Sequence[MemoryBank] | None = None,
        *,
        random_chunks: RandomChunks | None = None,
        any_model: bool = False,
    ) -> None:
        """Begin new streams, with empty windows.

        Parameters
        ----------
        banks
            A bank for each row, for instance one that already holds another text, which the same model read with the
            same ``retrieval_layers``; new ones by default.
        random_chunks
            Now and then, chunks at random instead of those that were asked for, as training uses them.
        any_model
            Take banks that another model filled, or this one with other settings, if shapes fit. What this model makes
            of their keys and values is another question.

        Raises
        ------
        InvalidArgumentError
            If a bank does not fit the retriever, the model or the settings, or two rows would share one.
        """
        self._given_banks = None if banks is None else self._checked(banks, any_model=any_model)
        self._takes_any_model = any_model
        self._random_chunks = random_chunks
        self._streams: Streams | None = None
        self._call = object()  # the latest call that reads; those before it have ended

    def use_banks(self, banks: Sequence[MemoryBank], *, any_model: bool = False) -> None:
        """Let the streams go on with other banks, from the next retrieval; their windows stay.

        Parameters
        ----------
        banks
            One for each row, as `reset` takes them.
        any_model
            As for `reset`.

        Raises
        ------
        InvalidArgumentError
            If a bank does not fit, two rows would share one, or there are not as many as rows.
        """
        given = self._checked(banks, any_model=any_model)
        rows = self._streams.rows if self._streams else ()
        if len(given) != len(rows):
            raise InvalidArgumentError(
                f"banks holds {len(given)} banks for {len(rows)} rows; expected one for each row that streams."
            )
        if self._streams is not None:
            self._streams.use_banks(given)

    def flush(self) -> list[list[int]]:
        """Store what the windows still hold, and begin new streams over the same banks.

        A bank is then worth keeping without its decoder, as in a `BankPool`.

        Returns
        -------
        list of lists of int
            Of each row, the latest tokens, fewer than a chunk, that no bank holds: to be read before what comes next.
            The first ``sink_tokens`` of a stream are in no bank either.

        Raises
        ------
        MemlongError
            If the configuration has ``backend=None``: there are no banks.
        """
        if self.config.backend is None:
            raise MemlongError("There is no bank to store the window in: the configuration has backend=None.")
        if self._streams is None:
            return []
        with self._slot.reading:
            banks = self.banks
            left = self._streams.flush()
            self.reset(banks, any_model=True)
        return left

    def stream(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        logits: Literal["all", "last"] = "all",
        gradients: bool = False,
    ) -> Segments:
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

        Returns
        -------
        Segments
            An iterator over a `Segment` for each forward call, whose length is how many are to come.

        Raises
        ------
        InvalidArgumentError
            If shapes, token ids or the number of rows are wrong.
        MemlongError
            If the decoder is not attached, or was reset while this call was under way.
        """
        if logits not in ("all", "last"):
            raise InvalidArgumentError(f"logits is {logits!r}; expected 'all' or 'last'.")
        pending = token_lists(input_ids, attention_mask, self._layout)
        return self._begun(pending, 0 if logits == "all" else 1, gradients=gradients)

    def read(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Read text in, and return the logits [rows, vocabulary] that follow each row's last token.

        Raises
        ------
        InvalidArgumentError
            If a row holds no token, or as `stream` does.
        """
        pending = token_lists(input_ids, attention_mask, self._layout)
        if not all(pending):
            raise InvalidArgumentError(
                "A row of input_ids holds no token; expected at least one in every row."
            )
        last: Tensor | None = None
        for segment in self._begun(pending, 1, gradients=False):
            fresh = segment.logits[:, -1]
            spoke = segment.tokens[:, -1:].to(fresh.device) >= 0
            last = fresh if last is None else torch.where(spoke, fresh, last)
        return cast("Tensor", last)

    def _begun(self, pending: list[list[int]], logits_to_keep: int, *, gradients: bool) -> Segments:
        self._check_attached()
        with self._slot.reading:
            self._streams = streams = self._streams_for(len(pending))
            self._call = object()
        return Segments(
            self._segments(streams, pending, logits_to_keep, gradients=gradients),
            streams.segments_of(pending),
        )

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

    def _streams_for(self, rows: int) -> Streams:
        if self._streams is None:
            return self._begin(rows)
        if rows != len(self._streams.rows):
            raise InvalidArgumentError(
                f"input_ids has {rows} rows, but the streams so far have {len(self._streams.rows)}; "
                "call reset() to begin new ones."
            )
        return self._streams

    def _begin(self, rows: int) -> Streams:
        given = self._given_banks
        if given is not None and len(given) != rows:
            raise InvalidArgumentError(
                f"banks holds {len(given)} banks for {rows} rows; expected one for each row."
            )
        if given is not None:  # and perhaps filled since
            self._checked(given, any_model=self._takes_any_model)
        return self._streams_over(given or [self._new_bank() for _ in range(rows)])

    def _streams_over(self, banks: Sequence[MemoryBank | None]) -> Streams:
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

    def _checked(self, banks: Sequence[MemoryBank], *, any_model: bool) -> tuple[MemoryBank, ...]:
        if self.retriever is None or self.config.backend is None:
            raise InvalidArgumentError(
                "banks were given, but the configuration has backend=None: name a backend."
            )
        found = check_banks(banks, self.retriever, self.layout)
        if not any_model and any(bank.origin is not None for bank in found):
            check_origins(
                found, origin_of(self.model, self.config, self._layout, self._source, self.retriever)
            )
        return found
