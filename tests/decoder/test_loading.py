"""Loading a model: quiet, and nothing of the process is changed for good."""

from __future__ import annotations

import sys
import threading

import pytest
import transformers
from transformers import AutoTokenizer, modeling_gguf_pytorch_utils
from transformers.utils import logging

from memlong import load_model
from memlong.decoder.quiet import quiet_loading
from memlong.errors import InvalidArgumentError


def test_threads_that_load_leave_stderr_and_the_settings_as_they_were(monkeypatch):
    before = sys.stderr, logging.get_verbosity(), logging.is_progress_bar_enabled()
    calls: list[bool] = []
    second, first_done = threading.Event(), threading.Event()

    def fail(*_, **__):
        calls.append(sys.stderr is before[0])
        if len(calls) == 1:
            second.wait(1)
        else:
            second.set()
            first_done.wait(1)
        raise OSError("nothing there")

    def load():
        with pytest.raises(InvalidArgumentError, match="nothing there"):
            load_model("tiny")
        first_done.set()

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fail)
    threads = [threading.Thread(target=load) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [True, True]  # while a model loads, others can write to stderr
    assert (sys.stderr, logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_no_bar_of_transformers_shows_while_loading(capsys, monkeypatch):
    # As in a process that has read no GGUF file yet: transformers does not offer the module by itself.
    monkeypatch.delattr(transformers, "modeling_gguf_pytorch_utils")
    with quiet_loading():
        for bar in (logging.tqdm, modeling_gguf_pytorch_utils.tqdm):
            assert list(bar(range(3), desc="Loading weights")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    list(modeling_gguf_pytorch_utils.tqdm(range(3), desc="own again"))
    assert "own again" in capsys.readouterr().err
