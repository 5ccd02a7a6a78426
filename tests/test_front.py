"""bench/front.py on a tiny random model: its systems, the gap they close, and what they cost."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from memlong import MemoryConfig, MemoryDecoder
from memlong.errors import InvalidArgumentError, InvalidTextError
from memlong.evaluation import evaluate_perplexity


@pytest.fixture(autouse=True)
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "bench"))  # where Python would look, too
    yield importlib.import_module
    for name in ("front", "front_costs", "systems"):  # patched, or not the next test's
        sys.modules.pop(name, None)


@pytest.fixture
def run(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench("front_costs"), "ROUNDS", 1)
    front = bench("front")
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(front.main)

    def run(*typed: object):
        """Run it on two texts; the model has no tokenizer, so their tokens are random."""
        sizes = ["--max-tokens", 1500, "--score-from", 1200, "--windows", 1152, "--chunks", "1,2"]
        options = ["--model", "random-tiny", "--dtype", "float32", "--text", "a.py", "--text", "b.txt"]
        result = CliRunner().invoke(app, [*map(str, [*options, *sizes, "--out", tmp_path, *typed])])
        if result.exception:
            raise result.exception
        return result.stdout, json.loads((tmp_path / "front.json").read_text(encoding="utf-8"))

    run.front = front
    return run


@pytest.mark.slow
def test_each_system_has_its_gap_and_its_costs(run, tmp_path):
    said, found = run("--system", "mine 2: kv_source=shared, top_k=2")
    names = ["window 1024", "window 1152", "full", "lm 1", "lm 2", "mine 2"]
    assert list(found["systems"]) == list(found["costs"]) == names
    assert {name: each["family"] for name, each in found["systems"].items()} == dict(
        zip(names, ["window"] * 3 + ["lm"] * 2 + ["mine"], strict=True)
    )
    assert {kind: each["texts"] for kind, each in found["kinds"].items()} == {
        "code": ["a.py"],
        "prose": ["b.txt"],
    }
    costs = found["costs"]
    assert costs["window 1024"]["reading"] == costs["window 1024"]["generating"] == 1
    assert costs["lm 2"]["kv_moved"] == 4 * costs["mine 2"]["kv_moved"]  # each of four layers' K-V, or one's
    assert costs["lm 2"]["kv_read"] == costs["window 1024"]["kv_read"] + costs["lm 2"]["kv_moved"]
    assert costs["window 1024"]["stored_per_token"] is None
    assert costs["lm 2"]["stored_per_token"] > 4 * 2 * 2 * 16 * 4  # layers, K and V, heads, numbers, bytes
    assert "| mine 2 |" in said
    assert {path.name for path in tmp_path.glob("front*")} == {
        "front.json",
        "front_code.png",
        "front_prose.png",
    }
    assert found["complete"]


def test_a_system_that_is_added_is_all_that_is_run(run, monkeypatch):
    _, before = run("--no-times")
    streamed = []

    def evaluated(decoder, *given, **named):
        streamed.append(decoder.config.top_k)
        return evaluate_perplexity(decoder, *given, **named)

    monkeypatch.setattr(run.front, "evaluate_perplexity", evaluated)
    _, after = run("--no-times", "--system", "mine 3: top_k=3")
    assert streamed == [3]  # the two texts have the same tokens
    assert after["texts"]["a.py"]["systems"].items() >= before["texts"]["a.py"]["systems"].items()


def test_what_there_is_no_time_for_is_named(run):
    said, found = run("--seconds", 0)
    *runs, tokens = found["left_out"]
    assert runs == [
        f"{text}, {name}: out of time"
        for text in ("a.py", "b.txt")
        for name in ("window 1152", "lm 1", "lm 2")
    ]
    assert tokens == "times of tokens beyond 0 of 1 rounds: out of time"
    assert list(found["costs"]) == ["window 1024", "full"]
    assert found["costs"]["full"]["generating"] is None
    assert "Skipped a.py, lm 1" in said


@pytest.mark.parametrize(("chunks", "mode"), [(2, "before-window"), (4, "zero")])
def test_beyond_the_length_of_the_model_another_system_is_the_ceiling(bench, run, monkeypatch, chunks, mode):
    monkeypatch.setattr(bench("shapes"), "_POSITIONS", 1400)
    with pytest.raises(
        InvalidArgumentError, match=r"'full' \(texts of 1,500 tokens exceed the model's 1,400"
    ):
        run()
    name = f"lm {chunks}"
    _, found = run("--chunks", f"1,{chunks}", "--ceiling", name, "--no-times")
    assert list(found["systems"]) == ["window 1024", "window 1152", "lm 1", name]
    assert found["systems"]["lm 1"]["settings"] == {"position_mode": mode, "top_k": 1}


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["--system", "lm 2"], "--system must be NAME: key=value, key=value, such as .*, got 'lm 2'"),
        (["--system", "lm 2: top_k=2"], "Systems must have different names, got 'lm 2' twice: rename one"),
        (["--system", "mine: top=2"], "MemoryConfig has no setting 'top'"),
        (["--system", "x: kind=[1]"], r"kind must be one of 'memory', .*, got \[1\]"),
        (
            ["--system", "x: kind=foreign, text=5", "--no-times"],
            "text must be the path of a text file, got 5",
        ),
        (
            ["--system", "x: kind=foreign, tokens=many", "--no-times"],
            "tokens must be an integer of at least 1, got 'many'",
        ),
        (
            ["--system", "x: kind=foreign"],
            r"'x' .kind='foreign'. cannot be timed here: leave it out, or .* .stream.",
        ),
        (["--ceiling", "lm 3"], "--ceiling must be one of 'window 1024'.*, got 'lm 3'"),
        (["--text", "a.py"], "Texts must have different names, got 'a.py' twice: rename one"),
        (["--score-from", "1500"], r"more tokens than --score-from or --last \(1,500\), got 1,500: lower it"),
    ],
)
def test_what_cannot_be_compared_is_named(run, typed, message):
    with pytest.raises((InvalidArgumentError, InvalidTextError), match=message):
        run(*typed)


def test_a_system_is_described_by_settings_that_may_hold_commas(bench):
    described = bench("systems").described
    text = (
        'mine 4: retrieval_layers=1,3, top_k=4, store={"host": "1GB", "dtype": "bfloat16"}, retriever=random'
    )
    system = described(text, MemoryConfig(local_window=512))
    assert (system.name, system.family) == ("mine 4", "mine")
    assert system.config == MemoryConfig(
        local_window=512,
        retrieval_layers="1,3",
        top_k=4,
        store={"host": "1GB", "dtype": "bfloat16"},
        retriever="random",
    )
    assert set(system.settings) == {"local_window", "retrieval_layers", "top_k", "store", "retriever"}


def test_a_file_that_settings_name_counts_by_its_content(bench, tmp_path):
    path = tmp_path / "gates.safetensors"
    system = bench("systems").System("mine", MemoryConfig(gates=str(path)))
    path.write_bytes(b"one")
    one = system.facts
    path.write_bytes(b"two")
    assert one != system.facts
    assert one.keys() == {"gates", "retrieval"}


def test_generation_is_scored_as_reading_is_where_both_see_everything(bench, llama):
    ids = torch.randint(3, 90, (1, 150), generator=torch.Generator().manual_seed(0))
    ids[0, 120] = llama.config.eos_token_id  # ends nothing: it is text
    config = MemoryConfig(
        backend=None, local_window=182, segment_size=32, chunk_size=16, position_mode="original"
    )
    with MemoryDecoder(llama, None, config) as decoder:
        read = evaluate_perplexity(decoder, ids, score_from=100).token_nll
        said = bench("forced").generated_losses(decoder, ids, 50)
    np.testing.assert_allclose(said, read, atol=1e-5)


def test_scores_of_generation_come_from_the_last_tokens(run):
    _, found = run("--reading", "token", "--last", 20, "--no-times", "--text", "c.py", "--chunks", 1)
    assert found["reading"] == "token"
    assert [each["tokens"] for each in found["texts"].values()] == [20, 20, 20]
    assert found["kinds"]["code"]["texts"] == ["a.py", "c.py"]


def test_a_system_may_put_chunks_into_the_prompt_as_text(run, bench):
    described = bench("systems").described
    assert described("rag 1: kind=text, top_k=1", MemoryConfig()).kind == "text"
    with pytest.raises(InvalidArgumentError, match=r"kind must be one of .memory., .*, got 2"):
        described("rag 1: kind=2", MemoryConfig())
    _, found = run("--system", "rag 1: kind=text, top_k=1", "--no-times")
    assert found["systems"]["rag 1"]["settings"]["kind"] == "text"
    assert found["texts"]["a.py"]["systems"]["rag 1"]["all"]["perplexity"] > 1


def test_key_tokens_are_those_that_a_long_context_makes_likely(bench):
    window, ceiling = np.array([4.0, 5.0, 4.0, 3.0]), np.array([1.5, 2.5, 2.1, 1.5])
    assert bench("gap").key_tokens(window, ceiling).tolist() == [True, False, False, False]
    systems = {"a": {"all": None, "key": {"gap_closed": None}}}
    shown = bench("front_tables").by_text({"texts": {"t": {"systems": systems}}}, "t")
    assert "| key tokens |" in shown.splitlines()[0]
    assert "key tokens" not in bench("front_tables").by_text({"texts": {"t": {"systems": {"a": {}}}}}, "t")


def test_the_gap_closed_is_a_ratio_of_logarithms_averaged_over_texts(bench):
    gap = bench("gap")
    rng = np.random.default_rng(0)
    window = rng.random(4096) + 1
    gain = rng.random(4096)
    every = np.ones(4096, dtype=bool)
    half = gap.Scored(window - gain / 2, window, window - gain, every)
    found = gap.gap_closed([half])
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))  # however it is resampled
    noisy = gap.Scored(window - gain * rng.random(4096), window, window - gain, every)
    found = gap.gap_closed([noisy])
    assert found.low < found.value < found.high
    both = gap.gap_closed([half, noisy])
    assert both.value == pytest.approx((0.5 + found.value) / 2)
    assert both.high - both.low < found.high - found.low
    early = np.arange(4096) < 512
    only_early = gap.Scored(np.where(early, window - gain, window), window, window - gain, early)
    assert gap.gap_closed([only_early]).value == 1
    assert gap.gap_closed([gap.Scored(window, window, window + gain, every)]) is None
