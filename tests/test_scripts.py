"""The scripts in examples/ and bench/ on a tiny random model: what they print, and how they refuse."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import typer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from memlong import MemoryConfig, MemoryDecoder, load_model
from memlong.decoder.persistence.fingerprint import query_facts
from memlong.errors import InvalidArgumentError, InvalidTextError
from memlong.training import QueryMap

ROOT = Path(__file__).parent.parent
WORDS = ["?", *(f"word{number}" for number in range(96))]


def script(name: str) -> ModuleType:
    sys.path[:] = dict.fromkeys([*sys.path, str((ROOT / name).parent)])  # where Python would look, too
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / name)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def invoke(module: ModuleType, *typed: object, **given: str):
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(module.main)
    return CliRunner().invoke(app, [str(each) for each in typed], **given)


@pytest.fixture
def folder(tmp_path, llama):
    llama.config.max_position_embeddings = 4096
    llama.save_pretrained(tmp_path / "model")
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(" ".join(WORDS[1 + number * number % 89] for number in range(1500)), encoding="utf-8")
    return path


@pytest.fixture
def chat(folder, book):
    module = script("examples/chat_with_a_book.py")

    def run(*typed: object, **given: str):
        options = ["--book", book, "--model", folder, "--dtype", "float32", "--max-new-tokens", 3]
        return invoke(module, *options, "--retriever", "lm", *typed, **given)

    return run


def test_a_book_is_read_and_talked_about(chat, tmp_path):
    result = chat("--store", f"disk={tmp_path}", "--question", "word1 word2", "--question", "word3")
    assert result.exit_code == 0, result.output
    assert [line for line in result.stdout.splitlines() if line.startswith(">")] == [
        "> word1 word2",
        "> word3",
    ]


@pytest.mark.parametrize("typed", ["word1\n\n", "word1\n"])  # an empty line, and the end of the input
def test_questions_come_from_the_keyboard_until_there_are_no_more(chat, typed):
    result = chat(input=typed)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("> ") == 2


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["--question", "word1", "--question", ""], "--question must not be empty"),
        (["--store", "disk"], "such as --store host=1GB"),
    ],
)
def test_what_the_talk_cannot_use_is_named(chat, typed, message):
    with pytest.raises(InvalidArgumentError, match=message):
        raise chat(*typed).exception


PROGRAM = """
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


@pytest.mark.slow
def test_ctrl_c_ends_the_talk_with_a_line(folder, book):
    book.write_text("word1 word2 word3 word4 " * 100_000, encoding="utf-8")
    typed = ["--book", book, "--model", folder, "--dtype", "float32", "--retriever", "lm"]
    command = [sys.executable, "-c", PROGRAM, ROOT / "examples/chat_with_a_book.py", *typed]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        try:
            said = bytearray()
            while b"book.txt" not in said or b"tok/s" not in said:  # the bar moves: the book is being read
                read = process.stderr.read1()
                assert read, said.decode()
                said += read
            process.send_signal(signal.SIGINT)
            said += process.stderr.read()
            assert process.wait(timeout=60) == 130
        finally:
            process.kill()
    assert said.decode().splitlines()[-1] == "chat_with_a_book: interrupted"
    assert b"Traceback" not in said


@pytest.mark.slow
def test_the_long_context_bench_measures_both_systems_and_draws_three_panels(
    folder, book, tmp_path, monkeypatch, capfd
):
    from matplotlib.figure import Figure

    bench, panels = script("bench/long_context.py"), []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: panels.extend(figure.axes))
    bench.main(model=str(folder), text=book, lengths="1000", dtype="float32", out=tmp_path)
    found = json.loads((tmp_path / "long_context.json").read_text(encoding="utf-8"))
    assert [row["system"] for row in found["rows"]] == ["full attention", "memory"]
    assert [panel.get_title().split(" ")[0] for panel in panels] == ["time", "K-V", "peak"]
    assert "memory, 1,000 tokens:" in capfd.readouterr().err  # its bar


@pytest.mark.slow
def test_the_long_context_bench_passes_on_what_a_measurement_refuses(book, tmp_path, capfd):
    bench = script("bench/long_context.py")
    with pytest.raises(SystemExit) as ended:
        bench.main(model="nosuchfolder/", text=book, lengths="1000", out=tmp_path)
    said = capfd.readouterr().err
    assert ended.value.code == 1
    assert "bench: The model 'nosuchfolder/' could not be loaded" in said
    assert "Traceback" not in said


def test_the_long_context_bench_names_a_text_that_is_too_short(folder, book):
    typed = ["--model", folder, "--text", book, "--dtype", "float32", "--one", "memory:2000"]
    with pytest.raises(InvalidTextError, match="1,500 tokens, fewer than 2,000: give a longer one"):
        raise invoke(script("bench/long_context.py"), *typed).exception


@pytest.mark.slow
def test_the_decoder_bench_compares_memory_with_the_plain_window(tmp_path):
    out = tmp_path / "decoder.json"
    typed = ["--model", "random-tiny", "--backend", "torch", "--tokens", 512, "--new-tokens", 3]
    result = invoke(script("bench/decoder.py"), *typed, "--training-tokens", 256, "--json", out)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text(encoding="utf-8"))
    assert [ratio["name"] for ratio in found["ratios"]] == [
        "streaming, torch",
        "generating, torch to plain window",
        "generating, torch to transformers",
        "training, torch to plain window",
        "training, torch to one plain pass",
    ]
    assert [ratio["target"] for ratio in found["ratios"]] == [1.15, None, None, None, None]
    parts = found["parts"]["torch"]
    assert min(parts[part] for part in parts if part != "lower layers") > 0
    assert found["parts"]["plain window"]["search"] == 0
    assert "5 ratios measured" in result.stdout.splitlines()[-1]


@pytest.mark.slow
def test_the_parts_of_a_stream_are_timed_at_two_lengths(tmp_path):
    out = tmp_path / "profile.json"
    typed = ["--lengths", "2560,3072", "--segments", 2, "--json", out]
    result = invoke(script("bench/profile_stream.py"), *typed)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text(encoding="utf-8"))
    assert list(found["ms_per_segment"]) == ["2560", "3072"]
    targets = {ratio["name"]: ratio["target"] for ratio in found["ratios"]}
    assert targets["attention"] == targets["all but search"] == 1.1
    assert targets["search"] is None


def test_parts_below_the_first_retrieval_layer_are_told_apart(llama, small, text):
    watched = script("bench/parts.py").watched
    with MemoryDecoder(llama, None, small(retrieval_layers="2-3")) as decoder, watched(decoder) as watch:
        decoder.read(text(60))
    spent = watch.read()
    assert spent["lower layers"] > 0
    assert not any("forward" in vars(module) for module in llama.modules())  # the stopwatches are gone


def test_a_stream_of_a_3b_shape_says_how_far_it_came(tmp_path):
    out = tmp_path / "three_b.json"
    typed = [
        "--model",
        "random-tiny",
        "--tokens",
        "2048,4096",
        "--limit-gb",
        0,
        "--seconds",
        0,
        "--json",
        out,
    ]
    result = invoke(script("bench/three_b.py"), *typed)
    assert result.exit_code == 0, result.output
    assert "512 tokens of 2,048 before time ran out" in result.stdout
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert [row["kv_source"] for row in rows] == ["layer", "shared"]


def test_a_table_of_result_files_ends_with_missed_targets(tmp_path):
    results = script("bench/results.py")
    ratios = [
        results.Ratio("a", 1.2, 1.1),
        results.Ratio("b", 0.8, 0.9, at_least=True),
        results.Ratio("c", 1.0, 1.0),
        results.Ratio("d", 9.0),
    ]
    summary = results.summary(ratios)
    assert "targets missed: 2: a 1.20 (at most 1.1); b 0.80 (at least 0.9)" in summary
    results.write(tmp_path / "one.json", {}, ratios)
    assert results.table([tmp_path / "one.json"]).splitlines()[-1] == summary


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_gpu_script_runs_on_a_cpu(tmp_path):
    parts = "kernels bank"  # the other benches have tests of their own, and the rest are tests
    environment = {**os.environ, "DEVICE": "cpu", "SMALL": "1", "PYTHON": sys.executable, "PARTS": parts}
    command = ["bash", ROOT / "bench/gpu.sh", tmp_path / "out"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "targets missed:" in done.stdout.splitlines()[-1]
    assert {"kernels.json", "bank.json", "table.txt"} <= {path.name for path in (tmp_path / "out").iterdir()}


@pytest.fixture
def lengths(folder, book, tmp_path):
    bench = script("bench/context_lengths.py")

    def run(*typed: object):
        options = ["--text", book, "--model", folder, "--dtype", "float32", "--out", tmp_path / "lengths"]
        return bench, invoke(bench, *options, "--lengths", "1024,1500,4096", "--score-from", 1100, *typed)

    return run


def test_perplexity_by_length_has_a_row_for_each_system_and_a_cell_for_each_length(lengths, tmp_path):
    _, result = lengths()
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "lengths" / "context_lengths.json").read_text(encoding="utf-8"))
    (rows,) = found["texts"].values()
    assert list(rows) == [
        "plain window",
        "plain window, equal budget",
        "full attention",
        "memory, lm",
        "random chunks",
    ]
    assert all(list(row) == ["1024", "1500"] for row in rows.values())
    # The first window's length is the same for all, and full attention is a window that nothing leaves.
    assert len({row["1024"]["perplexity"] for row in rows.values()}) == 1
    assert rows["full attention"]["1500"] == rows["plain window, equal budget"]["1500"]
    ratios = found["ratios"]["book.txt"]["memory, lm"]["all"]
    assert ratios["tokens"] == 400
    assert set(ratios) > {"to plain window", "to plain window, equal budget", "to random chunks"}
    assert (tmp_path / "lengths" / "context_lengths.png").stat().st_size > 0


def test_what_was_measured_is_not_measured_again(lengths, monkeypatch):
    bench, first = lengths("--system", "plain")

    def again(*_: object, **__: object) -> None:
        raise AssertionError("streamed again")

    monkeypatch.setattr(bench, "evaluate_perplexity", again)
    _, second = lengths("--system", "plain")
    monkeypatch.undo()
    assert second.exit_code == first.exit_code == 0
    assert second.stdout == first.stdout


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["--system", "nope"], "--system must start one of 'plain window'.*got .'nope'."),
        (["--lengths", "x"], "must be comma-separated numbers"),
        (["--lengths", "1"], "--lengths must be at least 2"),
        (["--score-from", "0"], "token 0 cannot be predicted"),
    ],
)
def test_what_cannot_be_measured_is_named(lengths, typed, message):
    with pytest.raises(InvalidArgumentError, match=message):
        raise lengths(*typed)[1].exception


@pytest.mark.slow
def test_a_trained_decoder_leaves_the_plain_systems_alone(lengths, folder, book, tmp_path):
    pytest.importorskip("peft")
    from memlong import MemoryConfig, MemoryDecoder, load_model
    from memlong.training import Trainer, TrainingConfig

    model, tokenizer = load_model(str(folder), dtype="float32")
    config = MemoryConfig(retriever="lm", kv_source="shared", retrieval_layers="2-3", memory_layer=1)
    decoder = MemoryDecoder(model, tokenizer, config)
    documents = [torch.arange(1400) % 90]
    settings = TrainingConfig(steps=2, rows=1, lr=0.1, warmup_steps=0)
    Trainer(decoder, documents, settings, folder=tmp_path / "trained", base_model=str(folder)).run()
    other = tmp_path / "other.txt"
    other.write_text(book.read_text(encoding="utf-8").replace("word3", "word4"), encoding="utf-8")
    both = ["--text", other, "--system", "plain window", "--system", "trained"]
    _, plain = lengths("--text", other, "--system", "plain window")
    before = json.loads((tmp_path / "lengths" / "context_lengths.json").read_text(encoding="utf-8"))
    for kept in (tmp_path / "lengths").glob("*.npy"):
        kept.unlink()
    _, result = lengths(*both, "--adapter", tmp_path / "trained")
    assert plain.exit_code == result.exit_code == 0, result.output
    after = json.loads((tmp_path / "lengths" / "context_lengths.json").read_text(encoding="utf-8"))
    for text, rows in before["texts"].items():
        assert after["texts"][text]["plain window"] == rows["plain window"]
        assert {"trained memory", "trained, random chunks"} < set(after["texts"][text])


def test_maps_of_queries_are_compared_with_their_retriever(folder, tmp_path):
    """A map that changes nothing has the figures of its retriever."""
    book = tmp_path / "long.txt"
    book.write_text(" ".join(WORDS[1 + number * number % 89] for number in range(2300)), encoding="utf-8")
    config = MemoryConfig(segment_size=64)
    model, tokenizer = load_model(str(folder), dtype="float32", device="cpu")
    decoder = MemoryDecoder(model, tokenizer, config)
    facts = query_facts(config, decoder.retriever, model)
    QueryMap.identity(decoder.retriever.dim, 2, made_for=facts).save(tmp_path / "map.safetensors")
    options = ["--text", book, "--model", folder, "--dtype", "float32", "--segment-size", 64]
    options += ["--max-tokens", 2300, "--score-from", 2100, "--tried-tokens", 2200]
    out = tmp_path / "maps.json"
    result = invoke(
        script("bench/query_maps.py"),
        *options,
        "--map",
        f"none={tmp_path / 'map.safetensors'}",
        "--json",
        out,
    )
    assert result.exit_code == 0, result.output
    (row,) = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert row["segments"] > 0
    assert row["shares"]["none"] == row["shares"]["retriever"]
    assert row["systems"]["none"]["perplexity"] == row["systems"]["retriever"]["perplexity"]
    assert row["systems"]["none"]["to retriever"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert row["systems"]["random"]["perplexity"] != row["systems"]["retriever"]["perplexity"]


@pytest.mark.slow
def test_candidates_are_compared_with_the_retrievers(folder, book, tmp_path):
    rows = ["lm", "random", "token", "hidden", "keys", "mixed: lm and last"]
    typed = [part for row in rows for part in ("--row", row)]
    options = ["--text", book, "--model", folder, "--dtype", "float32", "--max-tokens", 1500]
    out = tmp_path / "retrievers.json"
    result = invoke(script("bench/retrievers.py"), *options, "--score-from", 1200, "--out", out, *typed)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert [row["retriever"] for row in found] == [
        "lm",
        "lm without recency",
        "lm, tokens alone",
        "random",
        "token embeddings",
        "hidden states, middle layer",
        "hidden states, last layer",
        "keys and queries, middle layer",
        "mixed: lm and last hidden states",
    ]
    assert all(row["perplexity"] > 1 and row["ms_per_segment"] > 0 for row in found)


@pytest.mark.slow
def test_the_snapshot_bench_compares_saving_with_writing_and_loading_with_reading(tmp_path):
    out = tmp_path / "snapshots.json"
    typed = ["--gigabytes", 0, "--rounds", 1, "--folder", tmp_path, "--json", out]
    result = invoke(script("bench/snapshots.py"), *typed)
    assert result.exit_code == 0, result.output
    assert "times the speed of a plain write" in result.output
    found = json.loads(out.read_text(encoding="utf-8"))
    assert set(found["speed_to_plain"]) == {"save", "load", "lazy load"}
    assert set(found["seconds"]) > {"write", "read"}


@pytest.mark.parametrize("typed", [["--rounds", 0], ["--folder", "no/such/folder"], ["--gigabytes", -1]])
def test_the_snapshot_bench_names_what_it_cannot_use(typed):
    result = invoke(script("bench/snapshots.py"), *typed)
    assert result.exit_code == 2
    assert typed[0] in result.output


@pytest.fixture
def brief(monkeypatch):
    """The bank bench with few vectors and short turns."""
    bench = script("bench/bank.py")
    for name, value in {"QUERIES": 64, "NEW": 64, "ROUNDS": 1}.items():
        monkeypatch.setattr(bench, name, value)
    return bench


@pytest.mark.slow
def test_the_bank_bench_compares_each_backend_with_its_library(brief, tmp_path):
    out = tmp_path / "bank.json"
    result = invoke(brief, "--sizes", 300, "--dims", 8, "--json", out, "--plot", tmp_path / "bank.png")
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text(encoding="utf-8"))
    assert {row["setting"] for row in found["rows"]} > {"torch", "faiss Flat", "faiss HNSW32", "hnswlib"}
    for row in found["rows"]:
        assert row["recall"] >= (1.0 if row["setting"] in {"torch", "faiss Flat"} else 0.5)
        assert set(row["bank"]) == set(row["raw"]) > {"build", "search 1", "retrieve 32", "add 32"}
        assert row["index_bytes"] >= 300 * 8 * 4
    assert (tmp_path / "bank.png").stat().st_size > 0
    assert result.output.splitlines()[-1] == summary_of(found["ratios"], aimed=0)


def summary_of(ratios, *, aimed):
    return f"{len(ratios)} ratios measured, {aimed} with a target; targets missed: 0"


@pytest.mark.parametrize(
    ("device", "clock"),
    [
        ("cpu", "cpu"),
        pytest.param(
            "cuda",
            "wall",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
            ],
        ),
    ],
)
def test_the_bank_bench_compares_torch_with_itself_on_a_device(brief, tmp_path, device, clock):
    out = tmp_path / "bank.json"
    sizes = ["--sizes", 300, "--dims", 8, "--backend", "torch", "--backend", "hnswlib"]
    result = invoke(brief, *sizes, "--device", device, "--json", out)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text(encoding="utf-8"))
    assert [row["setting"] for row in found["rows"]] == ["torch", "hnswlib"][: 1 if device == "cuda" else 2]
    assert found["rows"][0]["recall"] == found["rows"][0]["raw_recall"] == 1.0
    assert (found["clock"], found["machine"]["threads"]) == (clock, 1)


def test_the_bank_bench_leaves_out_what_cannot_compute_on_a_device(brief, capsys):
    graphs = [each for each in brief.SETTINGS if not each.is_exact]
    assert brief._able(graphs, torch.device("cuda")) == []
    said = capsys.readouterr().out
    assert "Skipped hnswlib: HnswlibIndex cannot compute on cuda" in said
    assert "Skipped faiss HNSW32: " in said


@pytest.mark.parametrize(
    "typed",
    [
        ["--sizes", "1,x"],
        ["--dims", "0"],
        ["--clock", "sun"],
        ["--device", "sun"],
        ["--device", "meta"],
        ["--device", "cuda:99"],
    ],
)
def test_the_bank_bench_names_what_it_cannot_use(brief, typed):
    result = invoke(brief, *typed)
    assert result.exit_code == 2
    assert typed[0] in result.output


def test_the_block_bench_compares_gathering_with_copying(tmp_path):
    out = tmp_path / "kv.json"
    sizes = ["--held", 4, "--layers", 1, "--heads", 1, "--chunk", 2, "--head-dim", 4, "--rounds", 1]
    result = invoke(script("bench/kv.py"), "--k", 3, *sizes, "--folder", tmp_path, "--json", out)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["gathered_bytes"] == 3 * 2 * 2 * 4 * 2
    assert {"host", "disk", "plain copy", "plain read"} < set(found["seconds"])
    assert result.output.splitlines()[-1].startswith("5 ratios measured, 2 with a target; targets missed")


def test_the_peer_bench_leaves_out_what_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "memorizing_transformers_pytorch", None)
    bench = script("bench/peers.py")
    result = invoke(bench, "--chunks", 100, "--dim", 8, "--rounds", 1, "--json", tmp_path / "peers.json")
    assert result.exit_code == 0, result.output
    assert "Skipped memorizing" in result.output
    assert result.output.splitlines()[-1] == summary_of([], aimed=0)


def test_the_last_line_names_missed_targets():
    ratios = script("bench/ratios.py")
    measured = [
        ratios.Ratio("slow", 1.5, 1.1),
        ratios.Ratio("quick", 1.0, 1.1),
        ratios.Ratio("copy", 0.5, 0.7, at_least=True),
        ratios.Ratio("any", 9.0),
    ]
    assert ratios.summary(measured) == (
        "4 ratios measured, 3 with a target; targets missed: 2: slow 1.50 (at most 1.1); copy 0.50 (at least 0.7)"
    )


@pytest.mark.slow
def test_benchmarks_of_others_score_every_system_and_go_on_where_they_ended(
    folder, book, tmp_path, capsys, monkeypatch
):
    bench, out = script("bench/benchmarks.py"), tmp_path / "out"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = WORDS[-1]
    tokenizer.save_pretrained(folder)
    typed = {"tasks": "ruler_local_vt", "lengths": "1024", "seeds": 2, "samples": 1, "haystack": book}
    typed |= {"system": ["mine: top_k=2"], "only": ["memory", "RAG", "mine"], "out": out}
    bench.main(model=str(folder), dtype="float32", **typed)
    found = json.loads((out / "benchmarks.json").read_text(encoding="utf-8"))
    assert list(found["rows"]) == ["memory", "RAG as text", "mine"]
    assert all(len(cells[0]["scores"]) == 2 for cells in found["cells"].values())
    assert "| mine |" in capsys.readouterr().out
    assert (out / "benchmarks.png").is_file()
    monkeypatch.setattr(bench, "simple_evaluate", None)
    bench.main(model=str(folder), dtype="float32", **typed)
    assert json.loads((out / "benchmarks.json").read_text(encoding="utf-8"))["cells"] == found["cells"]
    with pytest.raises(InvalidArgumentError, match="has no chat template: leave --chat-template out"):
        bench.main(model=str(folder), dtype="float32", chat_template=True, **typed)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(folder)
    asked = {}
    with monkeypatch.context() as patch:
        patch.setattr(bench, "simple_evaluate", lambda *_, **options: asked.update(options) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            bench.main(model=str(folder), dtype="float32", chat_template=True, **typed)
    assert asked["apply_chat_template"] is True
    for change, message in (
        ({"tasks": "documents"}, "The task ruler_local_qa_1 needs --squad"),
        ({"tasks": "babilong"}, "The task babilong_local_qa1 needs --babi"),
        ({"tasks": "ruler_local_xx"}, "--tasks must be among subset, .*, got 'ruler_local_xx'"),
        ({"system": ["peeks: kind=oracle"], "only": None}, "'peeks' .kind='oracle'. cannot generate here"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            bench.main(model=str(folder), dtype="float32", **typed | change)
    book.write_text("word1 " * 1500, encoding="utf-8")
    with pytest.raises(TypeError):  # another text is scored, which nothing does here
        bench.main(model=str(folder), dtype="float32", **typed)


def test_values_before_the_model_are_counted(folder, tmp_path, monkeypatch, capsys):
    bench, out = script("bench/found.py"), tmp_path / "found.json"
    ids = [1 + number * number % 89 for number in range(3000)]
    ids[300:304] = [91, 92, 93, 94]  # a key, and its value, in the third chunk
    prompts = [bench.Prompt([*ids, 91, 92], ["word92 word93", "word94"])]
    monkeypatch.setattr(bench, "_prompts", lambda *_: prompts)
    typed = {"model": str(folder), "tasks": "vt", "lengths": "1024", "json_file": out}
    bench.main(**typed, system=["one: top_k=1", "far: retriever=random, top_k=1", "near: answer_cutoff=0.9"])
    found = json.loads(out.read_text(encoding="utf-8"))["found"]["1024"]
    window = found["one"]["vt"]["tokens"] - 128
    assert 768 < window <= 1028  # what a chunk that leaves makes space for, and the sinks
    assert found == {
        "memory": {"vt": {"found": 1, "of": 2, "tokens": window + 8 * 128}},
        "one": {"vt": {"found": 1, "of": 2, "tokens": window + 128}},
        "far": {"vt": {"found": 0, "of": 2, "tokens": window + 128}},
        "near": {"vt": {"found": 1, "of": 2, "tokens": window + 128}},
    }
    assert f"| memory | 50 | {window + 8 * 128:,.0f} |" in capsys.readouterr().out
    for other in ("kind=quantized-4", "backend=none"):
        with pytest.raises(InvalidArgumentError, match="--system must be a memory, got 'x'"):
            bench.main(**typed, system=[f"x: {other}"])
    for other in ("recent", "hybrid"):
        with pytest.raises(
            InvalidArgumentError, match=f"compares by cosine and does not rerank, got '{other}'"
        ):
            bench.main(**typed, system=[f"x: retriever={other}"])
    with pytest.raises(InvalidArgumentError, match=r"--tasks must be among niah_single_1, .*, got 'xx'"):
        bench.main(**typed | {"tasks": "xx"})


@pytest.mark.slow
def test_many_questions_are_timed_for_each_system(folder, book, tmp_path):
    out = tmp_path / "questions.json"
    typed = [
        "--model",
        folder,
        "--dtype",
        "float32",
        "--text",
        book,
        "--length",
        1500,
        "--keys",
        2,
        "--json",
        out,
    ]
    result = invoke(script("bench/questions.py"), *typed, "--system", "mine: top_k=2")
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text(encoding="utf-8"))
    assert list(found["rows"]) == ["memory", "RAG as text", "full attention", "mine"]
    assert found["rows"]["RAG as text"]["kv_bytes"] == 0 < found["rows"]["memory"]["kv_bytes"]
    assert all(row["all_questions"] > row["one_question"] for row in found["rows"].values())
    assert "| mine |" in result.stdout
