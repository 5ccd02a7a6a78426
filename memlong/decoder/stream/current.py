"""The streams that a decoder is reading: begun over banks, checked, continued and replaced."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import Cache

from memlong.bank import MemoryBank
from memlong.decoder.interrupts import uninterrupted
from memlong.decoder.model.attachment import Attachment
from memlong.decoder.setup import Setup
from memlong.decoder.stream.attention_record import Counted
from memlong.decoder.stream.banks import check_banks
from memlong.decoder.stream.batch import StreamBatch
from memlong.decoder.stream.retrieval import Choice
from memlong.decoder.stream.segment import Segment, Segments
from memlong.errors import InvalidArgumentError, MemlongError


@dataclass(frozen=True)
class Turn:
    """The latest turn of a conversation.

    Attributes
    ----------
    cache
        Stands for it where ``past_key_values`` is passed.
    tokens_read
        How much the streams had read at its end.
    sequences
        [rows, columns]: what generate() returned, one for each row.
    """

    cache: Cache
    tokens_read: tuple[int, ...]
    sequences: Tensor


class CurrentStreams:
    """The streams of one decoder, from one `reset` to the next.

    Parameters
    ----------
    setup
        The model, its memory settings, and the parts made for them.
    attachment
        Whether the model's attention goes through the memory.

    Attributes
    ----------
    batch
        The streams; None before the first token.
    turn
        The latest turn of a conversation, if the streams have any.
    """

    def __init__(self, setup: Setup, attachment: Attachment) -> None:
        self._setup = setup
        self._attachment = attachment
        self.reset()

    @property
    def banks(self) -> tuple[MemoryBank, ...]:
        """The bank of each row; before the first token those that were passed in."""
        return self.batch.banks if self.batch else self._given_banks or ()

    @property
    def tokens_read(self) -> tuple[int, ...]:
        """How many tokens each row's stream has read."""
        return tuple(stream.seen for stream in self.batch.streams) if self.batch else ()

    def reset(
        self,
        banks: Sequence[MemoryBank] | None = None,
        *,
        bases: Sequence[MemoryBank] = (),
        choice: Choice | Sequence[Choice] | None = None,
        any_model: bool = False,
    ) -> None:
        """Begin new streams; arguments and errors are those of `MemoryDecoder.reset`."""
        if isinstance(bases, str) or not isinstance(bases, Sequence):
            raise InvalidArgumentError(f"bases must be a sequence of banks, got {bases!r:.80}")
        if bases and banks is not None:
            raise InvalidArgumentError(
                "banks and bases are both given: pass banks=[LayeredBank(bank, bases), ...] for banks of your own over "
                "bases"
            )
        if not all(hasattr(each, "choose") for each in _each(choice)):
            raise InvalidArgumentError(
                "choice must have a method choose(), as memlong.decoder.Choice, or be a sequence of such, one for each "
                f"row, got {choice!r:.80}"
            )
        self._given_banks = None if banks is None else check_banks(banks, self._setup, any_model=any_model)
        self._bases = tuple(bases)
        if bases:
            over = self._setup.new_bank(self._bases)
            check_banks([over] if over is not None else [], self._setup, any_model=any_model)
        self._takes_any_model = any_model
        self._choice = choice
        self.batch: StreamBatch | None = None
        self.turn: Turn | None = None
        self._reader = object()  # of the latest call that reads; earlier calls have ended

    def replace(self, batch: StreamBatch) -> None:
        """Continue with other streams in place of these."""
        with uninterrupted():  # the old streams or the new ones
            self.reset()
            self.batch = batch

    def use_banks(self, banks: Sequence[MemoryBank], *, any_model: bool) -> None:
        """Continue over other banks; arguments and errors are those of `MemoryDecoder.use_banks`."""
        given = check_banks(banks, self._setup, any_model=any_model)
        rows = self.batch.streams if self.batch else ()
        if len(given) != len(rows):
            raise InvalidArgumentError(
                f"banks must hold one bank for each of the {len(rows)} rows that stream, got {len(given)} banks"
            )
        if self.batch is not None:
            self.batch.use_banks(given)

    def flush(self) -> list[list[int]]:
        """Store what the windows still hold, and begin new streams over the same banks."""
        if self.batch is None:
            return []
        with self._attachment.slot.reading:
            banks = self.banks
            left = self.batch.flush()
            self.reset(banks, choice=self._choice, any_model=True)
        return left

    def over(self, banks: Sequence[MemoryBank | None]) -> StreamBatch:
        """Return new streams over these banks."""
        return StreamBatch(self._setup, self._attachment.slot, banks, _of_rows(self._choice, len(banks)))

    def for_rows(self, rows: int) -> StreamBatch:
        """Return streams for a batch of this many rows, new ones if there are none yet; they are not current yet.

        Raises
        ------
        InvalidArgumentError
            If there are other numbers of streams or banks, or another model has filled a bank.
        """
        if self.batch is not None:
            if rows != len(self.batch.streams):
                raise InvalidArgumentError(
                    f"input_ids must have {len(self.batch.streams)} rows, as the streams so far, got {rows}: "
                    "call reset() to begin new ones"
                )
            return self.batch
        given = self._given_banks
        if given is None:
            return self.over([self._setup.new_bank(self._bases) for _ in range(rows)])
        if len(given) != rows:
            raise InvalidArgumentError(
                f"banks must hold one bank for each of the {rows} rows, got {len(given)} banks"
            )
        check_banks(given, self._setup, any_model=self._takes_any_model)  # they may have been filled since
        return self.over(given)

    def forked(self, rows: int) -> StreamBatch:
        """Return streams to be dropped later: one for each row, or all from a single one."""
        if self.batch is not None and len(self.batch.streams) == 1:
            return self.batch.fork([0] * rows)
        return self.for_rows(rows).fork(range(rows))

    def preview(
        self,
        pending: list[list[int]],
        queries: Sequence[Sequence[int] | None] | None,
        choice: Choice | Sequence[Choice] | None,
        *,
        gradients: bool,
    ) -> Segment:
        """Read at most the rest of a segment in forks that are dropped; errors are those of `MemoryDecoder.preview`."""
        self._attachment.check()
        choices = _of_rows(choice, len(pending))
        with self._attachment.slot.reading:
            forks = self.forked(len(pending))
            if not any(pending):
                raise InvalidArgumentError("input_ids must hold at least one token, got none")
            forks.ask_next(queries)
            for stream, tokens, each in zip(forks.streams, pending, choices, strict=True):
                stream.choice = each
                if len(tokens) > stream.segment_rest:
                    raise InvalidArgumentError(
                        f"input_ids must have at most the {stream.segment_rest} tokens that are left of the segment, "
                        f"got {len(tokens)}"
                    )
            return forks.advance(pending, 0, gradients=gradients)

    def take_over(self, batch: StreamBatch) -> None:
        """Make these the current streams, for a new call that reads; an earlier call ends."""
        self.batch, self._reader = batch, object()

    def read(
        self,
        pending: list[list[int]],
        logits_to_keep: int,
        *,
        queries: Sequence[Sequence[int] | None] | None = None,
        gradients: bool,
    ) -> Segments:
        """Return the segments of each row's tokens, read as they are requested.

        Raises
        ------
        InvalidArgumentError
            As `for_rows`.
        MemlongError
            If the model is not attached, or another call came before the last segment.
        """
        self._attachment.check()
        with self._attachment.slot.reading:
            batch = self.for_rows(len(pending))
            batch.ask_next(queries)
            self.take_over(batch)
        segments = batch.read(pending, logits_to_keep, gradients=gradients, counted=Counted())
        return Segments(self._while_current(segments, self._reader), batch.segments_of(pending))

    def _while_current(self, segments: Iterator[Segment], reader: object) -> Iterator[Segment]:
        while True:
            self._attachment.check()
            if reader is not self._reader:
                raise MemlongError(
                    "This call of stream() has ended: reset(), generate() or another stream() came before its last "
                    "segment. What it had not read yet is not in the stream"
                )
            segment = next(segments, None)
            if segment is None:
                return
            yield segment


def _each(choice: Choice | Sequence[Choice] | None) -> Sequence[object]:
    if choice is None:
        return ()
    return choice if isinstance(choice, Sequence) else (choice,)


def _of_rows(choice: Choice | Sequence[Choice] | None, rows: int) -> Sequence[Choice | None]:
    """Return what chooses for each row.

    Raises
    ------
    InvalidArgumentError
        If there are other numbers of choices and rows.
    """
    if not isinstance(choice, Sequence):
        return [choice] * rows
    if len(choice) != rows:
        raise InvalidArgumentError(
            f"choice must have one element for each of the {rows} rows, or be one for all, got {len(choice)}"
        )
    return choice
