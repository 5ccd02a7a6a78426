"""MemoryDecoder: gives a transformers model a memory, and streams text of any length through it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from memlong.bank import MemoryBank
from memlong.decoder.attention import AttentionSlot, check_free, installed, replaced_attention
from memlong.decoder.config import MemoryConfig, parse_layers
from memlong.decoder.placement import check_positions, check_sight
from memlong.decoder.probe import probe
from memlong.decoder.retrievers.base import Retriever
from memlong.decoder.retrievers.create import create_retriever
from memlong.decoder.streams import Segment, Streams
from memlong.errors import InvalidArgumentError, MemlongError
from memlong.plugins import Registry


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
        self.config = config or MemoryConfig()
        self._layout = probe(model)
        check_positions(self.config, self._layout)
        self.retrieval_layers = parse_layers(
            self.config.retrieval_layers, self._layout.full_attention_layers, len(self._layout.layers)
        )
        check_sight(self.config, self._layout, self.retrieval_layers)
        self._registry = registry or Registry()
        self.retriever = retriever
        if self.config.backend is not None:
            self._registry.load_backend_class(self.config.backend)  # say now what cannot be had
            if retriever is None:
                self.retriever = create_retriever(
                    self.config.retriever, model, tokenizer, self.config.retriever_options, self._registry
                )
        self._slot = AttentionSlot()
        self._attached = ExitStack()
        self._is_attached = False
        self.reset()

    def __enter__(self) -> Self:
        check_free(self.model)
        with ExitStack() as stack:
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
        return tuple(row.bank for row in rows if row.bank is not None)

    @property
    def block_shape(self) -> tuple[int, int, int, int]:
        """Shape of a chunk's keys: (layers, kv_heads, chunk_size, head_dim)."""
        layer = self._layout.layers[0]
        return (len(self.retrieval_layers), layer.kv_heads, self.config.chunk_size, layer.head_dim)

    def reset(self, banks: Sequence[MemoryBank] | None = None) -> None:
        """Begin new streams, with empty windows.

        Parameters
        ----------
        banks
            A bank for each row, for instance one that already holds another text, which the same model read with the
            same ``retrieval_layers``; new ones by default.

        Raises
        ------
        InvalidArgumentError
            If a bank does not fit the retriever, the model or the settings, or two rows would share one.
        """
        self._given_banks = None if banks is None else self._checked(banks)
        self._streams: Streams | None = None

    def stream(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        logits: Literal["all", "last"] = "all",
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
        pending = _token_lists(input_ids, attention_mask, self._layout.vocabulary)
        if self._streams is None:
            self._streams = self._begin(len(pending))
        if len(pending) != len(self._streams.rows):
            raise InvalidArgumentError(
                f"input_ids has {len(pending)} rows, but the streams so far have {len(self._streams.rows)}; "
                "call reset() to begin new ones."
            )
        return self._segments(self._streams, pending, 0 if logits == "all" else 1)

    def read(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Read text in, and return the logits [rows, vocabulary] that follow each row's last token.

        Raises
        ------
        InvalidArgumentError
            If a row holds no token, or as :meth:`stream` does.
        """
        if not all(_token_lists(input_ids, attention_mask, self._layout.vocabulary)):
            raise InvalidArgumentError(
                "A row of input_ids holds no token; expected at least one in every row."
            )
        last: Tensor | None = None
        for segment in self.stream(input_ids, attention_mask, logits="last"):
            fresh = segment.logits[:, -1]
            spoke = segment.tokens[:, -1:].to(fresh.device) >= 0
            last = fresh if last is None else torch.where(spoke, fresh, last)
        return cast("Tensor", last)

    def _segments(self, streams: Streams, pending: list[list[int]], logits_to_keep: int) -> Iterator[Segment]:
        done = [0] * len(pending)
        while any(start < len(tokens) for start, tokens in zip(done, pending, strict=True)):
            if not self._is_attached:
                raise MemlongError("The decoder is not attached to its model: stream inside `with decoder:`.")
            if streams is not self._streams:
                raise MemlongError("reset() has ended the streams of this call: call stream() again.")
            upcoming = [
                tokens[start : start + row.segment_rest]
                for start, tokens, row in zip(done, pending, streams.rows, strict=True)
            ]
            segment = streams.advance(upcoming, self._slot, logits_to_keep)
            done = [start + len(new) for start, new in zip(done, upcoming, strict=True)]
            yield segment

    def _begin(self, rows: int) -> Streams:
        given = self._given_banks
        if given is not None and len(given) != rows:
            raise InvalidArgumentError(
                f"banks holds {len(given)} banks for {rows} rows; expected one for each row."
            )
        banks = given or [self._new_bank() for _ in range(rows)]
        return Streams(self.model, self._layout, self.config, self.retriever, self.retrieval_layers, banks)

    def _new_bank(self) -> MemoryBank | None:
        if self.config.backend is None or self.retriever is None:
            return None
        options = {"metric": self.retriever.metric, **self.config.backend_options}
        return self._registry.create_bank(self.config.backend, self.retriever.dim, **options)

    def _checked(self, banks: Sequence[MemoryBank]) -> tuple[MemoryBank, ...]:
        if self.retriever is None or self.config.backend is None:
            raise InvalidArgumentError(
                "banks were given, but the configuration has backend=None: name a backend."
            )
        if len({id(bank) for bank in banks}) < len(banks):
            raise InvalidArgumentError(
                "banks holds one bank twice; rows never share a bank: give each its own."
            )
        for bank in banks:
            if (bank.dim, bank.metric) != (self.retriever.dim, self.retriever.metric):
                raise InvalidArgumentError(
                    f"banks holds a bank of dim {bank.dim} and metric {bank.metric!r}, but the retriever "
                    f"{type(self.retriever).__name__} embeds in dim {self.retriever.dim} for metric "
                    f"{self.retriever.metric!r}: make the bank with those, or use the retriever it was made for."
                )
            if bank.block_shape not in (None, self.block_shape):
                raise InvalidArgumentError(
                    f"banks holds a bank of blocks {bank.block_shape}, but this decoder's (layers, K-V heads, "
                    f"chunk_size, head width) are {self.block_shape}: use the model and settings it was filled with."
                )
        return tuple(banks)


def _token_lists(input_ids: Tensor, attention_mask: Tensor | None, vocabulary: int) -> list[list[int]]:
    """Check shapes and ids, and take the padding out: one list of token ids for each row."""
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or input_ids.is_floating_point():
        raise InvalidArgumentError(
            f"input_ids is {_kind(input_ids)}; expected an integer tensor [rows, tokens]."
        )
    if attention_mask is None:
        rows: list[list[int]] = input_ids.tolist()
    elif not isinstance(attention_mask, Tensor) or attention_mask.shape != input_ids.shape:
        raise InvalidArgumentError(
            f"attention_mask is {_kind(attention_mask)}; expected a tensor like input_ids, {tuple(input_ids.shape)}."
        )
    else:
        rows = [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]
    for row in rows:
        if row and not 0 <= min(row) <= max(row) < vocabulary:
            odd = next(token for token in row if not 0 <= token < vocabulary)
            raise InvalidArgumentError(
                f"input_ids holds {odd}; the model's tokens go from 0 to {vocabulary - 1}. Use its own tokenizer, and "
                "an attention_mask that is 0 where input_ids is padded."
            )
    return rows


def _kind(given: object) -> str:
    return str(tuple(given.shape)) if isinstance(given, Tensor) else type(given).__name__
