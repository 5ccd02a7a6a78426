"""Systems of the benches that answer in another Python, with stand-ins for it and for kvpress."""

from __future__ import annotations

import importlib
import json
import shlex
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from memlong.errors import InvalidArgumentError, MemlongError, MissingDependencyError

BENCH = Path(__file__).parent.parent / "bench"
COUNTING = """
import json, os, sys
folder = sys.argv[3]
assert os.path.isfile(folder + "/model.safetensors")
print(json.dumps({"ready": True}), flush=True)
number = 10
for line in sys.stdin:
    with open(LOG, "a") as log:
        log.write(line)
    told = json.loads(line)
    if told.get("kept") == 3:
        sys.exit("no space left")
    if told.get("method") == "kvzip":
        said = {"error": "ValueError: cannot"}
    else:
        said = {"token": number}
    number += 1
    print(json.dumps(said), flush=True)
"""
PRESSES = """
from contextlib import contextmanager

class Press:
    def __init__(self, compression_ratio):
        self.ratio = compression_ratio

    @contextmanager
    def __call__(self, model):
        def keep_the_last(_module, _args, given, _output):
            for layer in given["past_key_values"].layers:
                kept = int(layer.keys.shape[2] * (1 - self.ratio))
                layer.keys, layer.values = layer.keys[:, :, -kept:], layer.values[:, :, -kept:]

        hook = model.model.register_forward_hook(keep_the_last, with_kwargs=True)
        yield
        hook.remove()

ExpectedAttentionPress = KVzipPress = SnapKVPress = Press
"""

SENTENCES = """
import os
import torch

class InfiniRetri:
    def __init__(self, model, tokenizer, topk, window_length):
        assert "chat_template.jinja" not in os.listdir(model.config.name_or_path)
        assert window_length == 19 and model.config._attn_implementation == "eager"
        self.model, self.tokenizer, self.sentences = model, tokenizer, topk

    def generate(self, context, question, prompt):
        kept = " ".join(context.split()[-20 * self.sentences:])
        turn = [{"role": "user", "content": prompt.format(context=kept, question=question)}]
        text = self.tokenizer.apply_chat_template(turn, tokenize=False)
        ids = self.tokenizer(text, return_tensors="pt").input_ids
        self.model(input_ids=ids[:, :9])
        self.model.generate(input_ids=ids, max_new_tokens=9)
"""


@pytest.fixture
def kvpress(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("systems.kvpress")


@pytest.fixture
def python(tmp_path, monkeypatch, kvpress):
    """Return a function that makes Python code the Python of kvpress."""

    def make(code):
        script, shell = tmp_path / "stand_in.py", tmp_path / "python"
        script.write_text(code, encoding="utf-8")
        shell.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {script} "$@"\n', encoding="utf-8")
        shell.chmod(0o755)
        monkeypatch.setenv(kvpress.PYTHON, str(shell))

    return make


@pytest.fixture
def worker(tmp_path, python):
    """Return a function that makes a module that the worker then finds."""

    def make(name, code):
        (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
        python(
            f"import runpy, sys\nsys.path.insert(0, {str(tmp_path)!r})\nsys.argv = sys.argv[2:]\n"
            "runpy.run_path(sys.argv[0], run_name='__main__')"
        )

    return make


@pytest.fixture
def log(tmp_path, python):
    """Make the Python of kvpress count, and return a function for what it was told."""
    path = tmp_path / "log"
    python(f"LOG = {str(path)!r}\n{COUNTING}")
    return lambda: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_an_answer_is_asked_for_token_by_token(llama, small, text, kvpress, log):
    ids = text(200)
    with kvpress.SnapKv(llama, None, small()) as decoder:
        decoder.read(ids[:, :150])
        said = decoder.generate(
            ids[:, 150:], remember=False, max_new_tokens=3, min_new_tokens=1, do_sample=False
        )
        assert said[0].tolist() == [*ids[0, 150:].tolist(), 10, 11, 12]
        again = decoder.generate(ids[:, 150:], max_new_tokens=1)
        assert again[0, 50:].tolist() == [13]
    first, *others, last = log()
    every = ids[0].tolist()
    kept = 2 + 24 + 3 * 4
    assert first == {
        "context": every[:136],
        "question": every[136:],
        "method": "snapkv",
        "kept": kept,
        "never": [2],
    }
    assert others == [{"never": []}] * 2
    assert last == {**first, "never": []}


def test_an_answer_ends_where_it_should(llama, small, text, kvpress, log):
    ids = text(30)
    with kvpress.ExpectedAttention(llama, None, small()) as decoder:
        assert decoder.generate(ids, max_new_tokens=9, eos_token_id=11)[0, 30:].tolist() == [10, 11]
        seen = []
        criteria = [lambda ids, scores: torch.tensor([ids[0, -1] == 13])]
        processors = [lambda ids, scores: seen.append(ids.shape[1]) or scores]
        said = decoder.generate(
            ids, max_new_tokens=9, stopping_criteria=criteria, logits_processor=processors, pad_token_id=0
        )
        assert said[0, 30:].tolist() == [12, 13]
        assert seen == [30, 31]
    assert [told["context"] for told in log() if "context" in told] == [[], []]


def test_what_it_cannot_do_is_refused(llama, small, text, kvpress, log):
    with kvpress.SnapKv(llama, None, small()) as decoder:
        with pytest.raises(InvalidArgumentError, match="greedily"):
            decoder.generate(text(9), max_new_tokens=2, do_sample=True)
        with pytest.raises(InvalidArgumentError, match="num_beams"):
            decoder.generate(text(9), max_new_tokens=2, num_beams=2)
        with pytest.raises(InvalidArgumentError, match="forced"):
            decoder.generate(text(9), max_new_tokens=2, logits_processor=[lambda _, scores: -scores])
        with pytest.raises(InvalidArgumentError, match="only answers prompts"):
            decoder.stream(text(9))


def test_what_goes_wrong_in_the_process_is_told(llama, small, text, kvpress, log):
    with (
        kvpress.KvZip(llama, None, small()) as decoder,
        pytest.raises(MemlongError, match="ValueError: cannot"),
    ):
        decoder.generate(text(9), max_new_tokens=2)
    few = type("Few", (kvpress.SnapKv,), {"attended_tokens": 3})
    with few(llama, None, small()) as decoder, pytest.raises(MemlongError, match="no space left"):
        decoder.generate(text(9), max_new_tokens=2)


def test_an_environment_is_asked_for(llama, small, text, kvpress, monkeypatch, python, tmp_path):
    monkeypatch.delenv(kvpress.PYTHON, raising=False)
    with pytest.raises(
        MissingDependencyError, match=r"python -m venv .*install torch kvpress, .*MEMLONG_KVPRESS_PYTHON"
    ):
        kvpress.SnapKv(llama, None, small())
    monkeypatch.setenv(kvpress.PYTHON, str(tmp_path / "nothing"))
    with (
        kvpress.SnapKv(llama, None, small()) as decoder,
        pytest.raises(MissingDependencyError, match=r"nothing cannot run kvpress_worker\.py"),
    ):
        decoder.generate(text(9), max_new_tokens=2)
    python("import kvpress_that_is_not_there")
    with (
        kvpress.SnapKv(llama, None, small()) as decoder,
        pytest.raises(MissingDependencyError, match="No module named 'kvpress_that_is_not_there'"),
    ):
        decoder.generate(text(9), max_new_tokens=2)


@pytest.mark.slow
@pytest.mark.parametrize("press", ["SnapKv", "KvZip"])
def test_the_worker_compresses_the_context_and_then_reads_the_question(
    llama, small, text, kvpress, worker, press
):
    worker("kvpress", PRESSES)
    ids = text(200)
    with getattr(kvpress, press)(llama, None, small(top_k=99)) as decoder:
        decoder.read(ids[:, :190])
        said = decoder.generate(ids[:, 190:], max_new_tokens=6, eos_token_id=[])
        plain = llama.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, eos_token_id=[]
        )
        assert said[0, 10:].tolist() == plain[0, 200:].tolist()
        decoder.config = small()  # 38 tokens
        said = decoder.generate(ids[:, 190:], max_new_tokens=6, eos_token_id=[])
        never = said[0, 10].tolist()
        other = decoder.generate(ids[:, 190:], max_new_tokens=1, min_new_tokens=1, eos_token_id=never)
        assert other[0, 10] != never
    mask = torch.ones(1, 1, 264, 264).tril().bool()
    mask[..., 136:, : 136 - 38] = False
    for number in range(6):
        read = torch.cat([ids, said[:, 10 : 10 + number]], dim=1)
        count = read.shape[1]
        with torch.no_grad():
            logits = llama(read, attention_mask=mask[..., :count, :count]).logits[0, -1]
        assert int(logits.argmax()) == said[0, 10 + number]


@pytest.mark.slow
def test_the_worker_answers_what_is_kept_of_the_sentences(llama, small, text, kvpress, worker):
    worker("infini_retri", SENTENCES)
    words = WordLevel({str(number): number for number in range(97)}, unk_token="0")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = Whitespace()
    ids, options = text(200), {"max_new_tokens": 6, "eos_token_id": []}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template="{{ messages }}")
    with kvpress.InfiniRetri(llama, fast, small()) as decoder:
        said = decoder.generate(ids, **options)
    assert fast.chat_template == "{{ messages }}"
    prompt = ids[:, 200 - 64 - 20 :]  # more sentences would be more than 38 tokens and the question
    plain = llama.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, **options)
    assert said[0, 200:].tolist() == plain[0, 84:].tolist()


def test_a_question_begins_with_a_sentence(kvpress):
    whole = importlib.import_module("systems.kvpress_worker").whole_sentences
    assert whole("It is 1. What is", " it? It is") == ("It is 1.", " What is it? It is")
    assert whole("It is 1.", " What?") == ("It is 1.", " What?")
    assert whole("So. It is 1.", " What?") == ("So. It is 1.", " What?")
    assert whole("no end", " at all") == ("no end", " at all")
    assert whole("It is. Pi is 3.", "14159 and") == ("It is.", " Pi is 3.14159 and")
    assert whole("Long ago. " + "x" * 500, " is it?") == ("Long ago. " + "x" * 500, " is it?")
