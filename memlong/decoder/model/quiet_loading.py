"""Loading with transformers, without its progress bars, one load at a time."""

from __future__ import annotations

import importlib
import importlib.util
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.utils import logging

from memlong.bank.forks import free_after_fork

_GGUF_READER = "transformers.modeling_gguf_pytorch_utils"
_ONE_AT_A_TIME = free_after_fork(threading.RLock())


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence transformers' progress bars and notes about loading, and nothing else.

    These settings are global to the process, so threads take turns, and the user's own are restored.
    """
    with _ONE_AT_A_TIME:
        verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            with _silencing_gguf():
                yield
        finally:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()


@contextmanager
def _silencing_gguf() -> Iterator[None]:
    """Make the progress bar for GGUF files, which ignores these settings, follow them."""
    reader: Any = importlib.import_module(_GGUF_READER) if importlib.util.find_spec(_GGUF_READER) else None
    bar = getattr(reader, "tqdm", None)
    if bar is None:
        yield
        return
    reader.tqdm = logging.tqdm
    try:
        yield
    finally:
        reader.tqdm = bar
