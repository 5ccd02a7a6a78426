"""Whatever line an interrupt comes at, going on from ``tokens_read`` gives what an uninterrupted stream gives."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import memlong.decoder
from memlong import MemoryDecoder

FOLDER = Path(memlong.decoder.__file__).parent
NAMES = (
    "batch.py",
    "batch_memory.py",
    "token_stream.py",
    "storing.py",
    "window.py",
    "window_cache.py",
    "group_window.py",
    "buffers.py",
    "forward.py",
    "retrieval.py",
    "positions.py",
)
FILES = {str(path) for name in NAMES for path in FOLDER.rglob(name)}


class Interrupter:
    """Counts the lines of some files that run, and raises KeyboardInterrupt at one of them."""

    def __init__(self, at=None):
        self.at = at
        self.lines = []

    def __enter__(self):
        self._before = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *_):
        sys.settrace(self._before)

    def _call(self, frame, event, argument):
        return self._line if frame.f_code.co_filename in FILES else None

    def _line(self, frame, event, argument):
        if event == "line":
            self.lines.append((frame.f_code.co_filename, frame.f_lineno))
            if len(self.lines) - 1 == self.at:
                raise KeyboardInterrupt
        return self._line


@pytest.mark.slow
def test_an_interrupt_at_any_line_loses_nothing(llama, small, text):
    ids, enough = text(62), 50
    with MemoryDecoder(llama, None, small()) as decoder:
        decoder.read(ids)
        spans, keys = contents(decoder)
        logits = decoder.read(ids[:, :3])
        decoder.reset()
        with Interrupter() as seen:
            decoder.read(ids[:, :enough])
        places = {}
        for index, line in enumerate(seen.lines):
            places.setdefault(line, []).append(index)
        for line, indices in places.items():
            decoder.reset()
            with pytest.raises(KeyboardInterrupt), Interrupter(indices[len(indices) * 3 // 4]):
                decoder.read(ids[:, :enough])
            decoder.read(ids[:, decoder.tokens_read[0] :] if decoder.tokens_read else ids)
            found_spans, found_keys = contents(decoder)
            assert found_spans == spans, line
            torch.testing.assert_close(found_keys, keys, rtol=0.0, atol=1e-5, msg=str(line))
            torch.testing.assert_close(decoder.read(ids[:, :3]), logits, rtol=0.0, atol=1e-5, msg=str(line))


def contents(decoder):
    bank = decoder.banks[0]
    chunks = bank.fetch(bank.ids)
    return chunks.spans.tolist(), chunks.keys
