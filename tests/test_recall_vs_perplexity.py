"""examples/recall_vs_perplexity.py on a tiny random model, and bench/agreement.py on what it writes."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from memlong import MemoryConfig, MemoryDecoder, Passage, Registry, load_model
from memlong.decoder import create_retriever
from memlong.errors import InvalidArgumentError
from memlong.evaluation import evaluate_perplexity, read_text, tokenize

ROOT = Path(__file__).parent.parent
WORDS = ["?", *(f"word{number}" for number in range(96))]
SIZES = {"max_tokens": 1400, "score_from": 700, "chunk_size": 32, "top_k": 3, "local_window": 320}


def script(name):
    sys.path[:] = dict.fromkeys([*sys.path, str((ROOT / name).parent)])
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / name)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def invoke(module, *typed):
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(module.main)
    return CliRunner().invoke(app, [str(each) for each in typed])


@pytest.fixture
def given(tmp_path, llama):
    """Folder of a model, and a text."""
    llama.config.max_position_embeddings = 4096
    llama.save_pretrained(tmp_path / "model")
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(tmp_path / "model")
    chance = np.random.default_rng(0)
    rare, common = WORDS[1:81], WORDS[81:]  # some are met again from afar
    text = " ".join(chance.choice(rare if chance.random() < 0.1 else common) for _ in range(1500))
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    return tmp_path / "model", tmp_path / "book.txt"


@pytest.fixture
def run(given, tmp_path):
    """Run the example; the figures that it writes."""

    def run(dtype="float32", out="out"):
        model, text = given
        options = [part for name, value in SIZES.items() for part in (f"--{name.replace('_', '-')}", value)]
        result = invoke(
            script("examples/recall_vs_perplexity.py"),
            *(
                "--model",
                model,
                "--text",
                text,
                "--retriever",
                "lm",
                "--dtype",
                dtype,
                "--out",
                tmp_path / out,
            ),
            *options,
        )
        assert result.exit_code == 0, result.output
        return json.loads((tmp_path / out / "recall_vs_perplexity.json").read_text(encoding="utf-8"))

    return run


@pytest.mark.slow
def test_each_system_has_the_figures_of_a_run_of_its_own(given, run):
    found = run()
    assert (found["device"], found["dtype"]) == ("cpu", "float32")
    model, tokenizer = load_model(str(given[0]), dtype="float32")
    ids = tokenize(tokenizer, read_text(given[1]), SIZES["max_tokens"])
    memory = {name: SIZES[name] for name in ("chunk_size", "top_k", "local_window")}
    for system in found["systems"]:
        if system["backend"] in ("none", "noisy"):
            continue
        options = system["options"][0]
        config = MemoryConfig(
            backend=system["backend"], backend_options=options, retriever="lm", position_mode="zero", **memory
        )
        with MemoryDecoder(model, tokenizer, config) as decoder:
            own = evaluate_perplexity(decoder, ids, score_from=SIZES["score_from"])
        assert system["overall"]["perplexity"] == pytest.approx(own.perplexity, rel=1e-6)
        assert system["recall_at_k"] == own.recall_at_k


@pytest.mark.slow
def test_systems_that_find_the_same_chunks_run_once(run, monkeypatch):
    module = script("examples/recall_vs_perplexity.py")
    monkeypatch.setitem(globals(), "script", lambda _: module)
    ran = []
    plain = module.evaluate_perplexity
    monkeypatch.setattr(
        module,
        "evaluate_perplexity",
        lambda decoder, *rest, **options: ran.append(decoder.config) or plain(decoder, *rest, **options),
    )
    found = run()
    systems = {system["name"]: system for system in found["systems"]}
    assert systems["hnswlib"]["overall"] == systems["torch (exact)"]["overall"]
    assert len(ran) <= sum(len(system["options"]) for system in found["systems"]) - 2
    assert "torch" not in [config.backend for config in ran]


def test_no_passage_is_embedded_twice(llama):
    same_chunks = script("examples/same_chunks.py")
    plain = create_retriever("lm", llama, None)
    embedded = []

    class Counting(type(plain)):
        def embed_chunks(self, chunks):
            embedded.extend(chunks)
            return super().embed_chunks(chunks)

    retriever = same_chunks.RememberingRetriever(Counting(llama, None))
    passages = [Passage(tuple(range(3 + start, 11 + start)), start) for start in (0, 8, 16)]
    assert torch.equal(retriever.embed_chunks(passages), plain.embed_chunks(passages))
    assert torch.equal(retriever.embed_chunks(passages[1:]), plain.embed_chunks(passages[1:]))
    assert embedded == passages
    assert torch.equal(retriever.embed_queries(passages), plain.embed_queries(passages))
    assert [kind for kind, _ in retriever.asked] == ["store", "store", "search"]


def test_an_index_is_asked_what_another_was(llama, text):
    same_chunks = script("examples/same_chunks.py")
    config = MemoryConfig(chunk_size=8, local_window=48, segment_size=16, top_k=2)
    retriever = same_chunks.RememberingRetriever(create_retriever("lm", llama, None))
    with MemoryDecoder(llama, None, config, retriever=retriever) as decoder:
        ids = [
            tuple(sorted(retrieval.ids.tolist()))
            for segment in decoder.stream(text(200))
            for retrieval in segment.retrievals
            if retrieval is not None
        ]
    assert len(ids) > 5
    assert same_chunks.chunks_found(config, retriever.asked, retriever, Registry()) == tuple(ids)


@pytest.mark.slow
def test_two_dtypes_are_set_side_by_side(run, tmp_path):
    run("float32", "one")
    run("bfloat16", "other")
    module = script("bench/agreement.py")
    result = invoke(module, tmp_path / "one", tmp_path / "other")
    assert result.exit_code == 0, result.output
    assert "to window, bfloat16" in result.stdout
    assert "torch (exact)" in result.stdout
    assert "Perplexities differ by" in result.stdout.splitlines()[-1]


@pytest.mark.slow
def test_figures_outside_of_the_intervals_are_counted(run, tmp_path):
    found = run()
    for system in found["systems"]:
        system["overall"]["to_window"] |= {"value": 2.0, "low": 1.9, "high": 2.1}
    (tmp_path / "odd.json").write_text(json.dumps(found), encoding="utf-8")
    result = invoke(script("bench/agreement.py"), tmp_path / "out", tmp_path / "odd.json")
    measured = sum(2 if system["long_range"] else 1 for system in found["systems"])
    assert f"{measured - len(found['systems'])} of {measured} lines" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 5}, "differ in tokens"),
        ({"systems": 1}, "is not a result of examples/recall_vs_perplexity.py"),
    ],
)
def test_what_cannot_be_compared_is_named(run, tmp_path, change, message):
    (tmp_path / "odd.json").write_text(json.dumps({**run(), **change}), encoding="utf-8")
    result = invoke(script("bench/agreement.py"), tmp_path / "out", tmp_path / "odd.json")
    with pytest.raises(InvalidArgumentError, match=message):
        raise result.exception
