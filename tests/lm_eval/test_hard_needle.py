"""hard-needle's prompts: they fit, hold all facts, and their scores are what they say."""

from __future__ import annotations

import sys

import pytest
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from memlong import MemoryDecoder, load_model
from memlong.errors import InvalidArgumentError, MissingDependencyError
from memlong.lm_eval import TASKS, MemlongLM
from memlong.lm_eval.tasks import hard_needle


def rows(given):
    return hard_needle.dataset(**given)["test"].to_list()


@pytest.fixture
def plain(given):
    return {name: value for name, value in given.items() if name != "haystack"}


def test_prompts_fit_and_hold_every_fact(plain):
    made = rows({**plain, "needles": 3})
    assert [row["max_length"] for row in made] == [1024, 2048, 1024, 2048]
    for row in made:
        assert 0.9 * row["max_length"] < len(row["input"].split()) <= row["max_length"] - 16
        assert len(row["choices"]) == 3
        assert all(value in row["input"] for value in row["choices"])
        assert row["outputs"] == [row["choices"][row["gold"]]]
    assert made[0]["choices"] == made[1]["choices"] != made[2]["choices"]
    assert rows({**plain, "needles": 3}) == made
    assert rows({**plain, "needles": 3, "seed": 1}) != made


def test_facts_may_be_hidden_in_a_text(given):
    made = rows({**given, "max_seq_lengths": 1024})
    assert all(row["input"].count("of this book tells little.") > 50 for row in made)


def test_scores_are_for_the_value_that_was_asked_for():
    doc = {"outputs": ["$2M"], "choices": ["$1.25M", "$2M", "$3M"], "gold": 1, "max_length": 1024}
    assert hard_needle.is_said(doc, [" $2M."]) == {"1024": 1.0}
    assert hard_needle.is_said(doc, ["It is $2M"]) == {"1024": 0.0}
    assert hard_needle.is_said({**doc, "outputs": ["Dr. Ann Park"]}, [" Dr. Ann Parker"]) == {"1024": 0.0}
    assert hard_needle.is_chosen(doc, [(-9.0, False), (-3.0, True), (-6.0, False)]) == {"1024": 1.0}
    assert hard_needle.is_chosen(doc, [(-3.0, False), (-3.0, True), (-6.0, False)]) == {"1024": 0.0}


def test_lm_eval_runs_both_tasks(folder, small, plain):
    model, tokenizer = load_model(str(folder), dtype="float32")
    told = {**plain, "samples": 1, "max_seq_lengths": [1024]}
    found = simple_evaluate(
        MemlongLM(MemoryDecoder(model, tokenizer, small())),
        tasks=["hard_needle_local"],
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False, metadata=told),
        bootstrap_iters=0,
    )
    assert {
        name: result["1024,none"] in (0, 1)
        for name, result in found["results"].items()
        if "1024,none" in result
    } == {"hard_needle_local_say": True, "hard_needle_local_choose": True}


def test_what_cannot_be_made_is_explained(plain, monkeypatch):
    with pytest.raises(InvalidArgumentError, match="needles must be an integer of at least 2, got 1"):
        rows({**plain, "needles": 1})
    with pytest.raises(
        InvalidArgumentError, match="Cannot make a prompt of hard-needle: Requested 99 needles"
    ):
        rows({**plain, "needles": 99})
    monkeypatch.setitem(sys.modules, "hard_needle", None)
    with pytest.raises(MissingDependencyError, match="pip install hard-needle"):
        rows(plain)
