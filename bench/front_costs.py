"""What systems cost, side by side: time of reading and of generating, and bytes of K-V."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import torch
from forced import say
from ratios import Clock
from results import Report
from systems.alternative import Alternative
from torch import Tensor
from tqdm import tqdm

from memlong.decoder.model.kernels import steady_kernels
from memlong.errors import InvalidTextError

ROUNDS = 5


@dataclass(frozen=True)
class Cost:
    """What one system costs, in medians and means over the same segments and tokens for all.

    Attributes
    ----------
    segment_seconds, token_seconds
        Medians of the time that a segment takes to read, and a token to generate.
    reading, generating
        The same relative to the first system, as medians of ratios that were measured in turns; None if time was up.
    kv_read
        Bytes of K-V that attention reads for a token, of window and memory, in all layers.
    kv_moved
        Bytes that a segment's retrieval reads from the bank: those of chunks that the last one did not find.
    stored_per_token
        Bytes of the bank per token that it holds; None for a plain window.
    """

    segment_seconds: float | None
    reading: float | None
    token_seconds: float | None
    generating: float | None
    kv_read: float
    kv_moved: float
    stored_per_token: float | None


def measure(
    decoders: Mapping[str, Any], input_ids: Tensor, first: int, clock: Clock, report: Report
) -> dict[str, Cost]:
    """Have all systems read a text [1, tokens] in turns, time it from token ``first`` on, then have them generate.

    All decoders, or what has their interface, must be of one model, and have one segment size. What there is no time
    for is left out: segments but for the first may take half of it, and tokens the rest.
    """
    model = next(iter(decoders.values())).model
    step = next(iter(decoders.values())).config.segment_size
    most = max(decoder.config.retrieval_interval for decoder in decoders.values())
    last = (input_ids.shape[1] - most - 2) // step * step
    begin = min(first // step * step, last - step)
    if begin < 0:
        raise InvalidTextError(
            f"The first text must have at least {step + most + 2} tokens to time a segment and the tokens after it, "
            f"got {input_ids.shape[1]:,}: give a longer one, or --no-times"
        )
    with steady_kernels(model.device):
        for decoder in tqdm(decoders.values(), desc="reading to where timing begins", leave=False):
            with decoder:
                decoder.reset()
                if begin:
                    decoder.read(input_ids[:, :begin])
        parts = input_ids[:, begin:last].split(step, dim=1)
        reading, sizes = _timed_reading(decoders, parts, clock, report)
        generating = _timed_generation(decoders, input_ids[:, last:], clock, report)
    return {
        name: Cost(
            reading.median(name),
            reading.ratio(name),
            generating.median(name),
            generating.ratio(name),
            *(fmean(each) for each in zip(*sizes[name], strict=True)),
            _stored(decoder),
        )
        for name, decoder in decoders.items()
    }


def _timed_reading(
    decoders: Mapping[str, Any], parts: Sequence[Tensor], clock: Clock, report: Report
) -> tuple[_Turns, dict[str, list[tuple[int, int]]]]:
    """Have each system read each segment; return the times, and bytes of K-V by system and segment."""
    turns, budget = _Turns(decoders), report.budget.share(2)
    sizes: dict[str, list[tuple[int, int]]] = {name: [] for name in decoders}
    held: dict[str, set[int]] = {name: set() for name in decoders}
    for number, part in enumerate(tqdm(parts, unit="segment", desc="timing segments", leave=False)):
        if number and budget.is_spent:
            report.leave_out(f"times of segments beyond {number} of {len(parts)}")
            break
        for name, decoder in turns.next_turn():
            with decoder:
                _wait(decoder.model.device)
                started = clock.now()
                segments = list(decoder.stream(part, logits="last"))
                _wait(decoder.model.device)
                turns.note(name, clock.now() - started)
                sizes[name].append(_kv_bytes(decoder, segments[-1], held[name]))
    return turns, sizes


def _timed_generation(decoders: Mapping[str, Any], rest: Tensor, clock: Clock, report: Report) -> _Turns:
    """Have each system generate the rest of a text [1, tokens] until it has retrieved once, in several rounds."""
    turns = _Turns(decoders)
    for number in tqdm(range(ROUNDS), unit="round", desc="timing tokens", leave=False):
        if report.budget.is_spent:
            report.leave_out(f"times of tokens beyond {number} of {ROUNDS} rounds")
            break
        for name, decoder in turns.next_turn():
            every = decoder.config.retrieval_interval  # the steps after the first token are so many
            with decoder:
                marks = say(decoder, rest[:, :1], rest[0, 1 : 2 + every], clock).marks
            turns.note(name, (marks[-1] - marks[0]) / every)
    return turns


class _Turns:
    """Times of systems that take turns, each round in another order."""

    def __init__(self, decoders: Mapping[str, Any]) -> None:
        self._decoders = list(decoders.items())
        self._first = self._decoders[0][0]
        self._times: dict[str, list[float]] = {name: [] for name in decoders}

    def next_turn(self) -> list[tuple[str, Any]]:
        """Return the systems in the order of this round."""
        self._decoders = [*self._decoders[1:], self._decoders[0]]
        return self._decoders

    def note(self, name: str, seconds: float) -> None:
        """Note a time."""
        self._times[name].append(seconds)

    def median(self, name: str) -> float | None:
        """Return the median time, or None if there was no time to measure."""
        return median(self._times[name]) if self._times[name] else None

    def ratio(self, name: str) -> float | None:
        """Return the median of the ratios to the first system in the same round."""
        both = zip(self._times[name], self._times[self._first], strict=True)
        ratios = [mine / its for mine, its in both]
        return median(ratios) if ratios else None


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _kv_bytes(decoder: Any, segment: Any, held: set[int]) -> tuple[int, int]:
    """Bytes of K-V that attention read for a token, and of chunks that were not ``held``, and are from now on."""
    config = decoder.config
    size = segment.logits.element_size()
    end = int(segment.tokens[0, -1]) + 1
    if isinstance(decoder, Alternative):
        return decoder.kv_read_bytes(end, size), 0
    room = config.sink_tokens + config.local_window
    window = 0
    for layer in decoder.model_layout.layers.values():
        window += min(end, room, layer.sliding_window or end) * layer.shape.numbers * size
    found = segment.retrievals[0]
    if found is None:
        return window, 0
    tokens, heads = len(found.ids) * config.chunk_size, decoder.source.heads
    read: float = tokens
    if config.attended_tokens is not None and config.attended_tokens < tokens:
        # The sketch is a byte for half of the keys' channels.
        read = config.attended_tokens + tokens / 4 / size
    memory = 0
    for number in decoder.source.retrieval_layers:
        layer = decoder.model_layout.layers[number]
        share = len(heads[number]) / layer.kv_heads if heads else 1
        memory += round(read * layer.shape.numbers * share) * size
    new = set(found.ids.tolist()) - held
    held.clear()
    held.update(found.ids.tolist())
    return window + memory, len(new) * decoder.layout.nbytes


def _stored(decoder: Any) -> float | None:
    chunks = sum(map(len, decoder.banks))
    if not chunks:
        return None
    return sum(bank.nbytes for bank in decoder.banks) / (chunks * decoder.config.chunk_size)
