"""``memlong icl`` on a tiny random model, whose answers mean nothing."""

from __future__ import annotations

import json
import re

import pytest

from memlong.errors import InvalidArgumentError, MemlongError

LABELS = "0=word1,1=word2"


@pytest.fixture
def labelled(tmp_path):
    def write(rows, name="examples.tsv", labels="01"):
        path = tmp_path / name
        lines = [f"word{number} word{number + 9}\t{labels[number % 2]}" for number in range(5, rows + 5)]
        path.write_text("text\tlabel\n" + "\n".join(lines), encoding="utf-8")
        return path

    return write


@pytest.fixture
def run(invoke, labelled):
    def with_files(**changes):
        given = {"demonstrations": labelled(40), "labels": LABELS, "shots": "2,12", "test_limit": 4}
        given.update(changes)
        return invoke("icl", **{name: value for name, value in given.items() if value is not None})

    return with_files


@pytest.mark.parametrize("backend", ["torch", "none"])
def test_table_and_json_show_each_number_of_shots(run, labelled, tmp_path, backend):
    file = tmp_path / "icl.json"
    result = run(json=file, tests=labelled(9, "tests.tsv"), backend=backend, calibrate=True)
    assert result.exit_code == 0, result.output
    assert "accuracy" in result.stdout
    assert "majority baseline: " in result.stdout
    found = json.loads(file.read_text(encoding="utf-8"))
    assert {"model", "backend", "retriever", "settings", "shots", "majority", "versions"} <= set(found)
    assert (found["backend"], found["retriever"]) == (backend, "lm" if backend == "torch" else None)
    assert found["settings"]["words"] == ["word1", "word2"]
    assert found["settings"]["calibrate"]
    assert found["local_window"] == 24
    assert 0.5 <= found["majority"]["accuracy"] <= 1
    few, many = found["shots"]
    assert " ".join(few) == "shots demonstration_tokens tests accuracy low high seconds"
    assert (few["shots"], many["shots"]) == (2, 12)
    assert few["demonstration_tokens"] * 6 == many["demonstration_tokens"]
    assert few["tests"] == many["tests"] == 4
    assert all(0 <= each["low"] <= each["accuracy"] <= each["high"] <= 1 for each in (few, many))


def test_without_tests_the_rest_of_the_demonstrations_is_asked_for(run):
    result = run(shots="36", test_limit=10, json="-")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["settings"]["tests"] is None
    assert found["shots"][0]["tests"] == 4


def test_labels_that_are_words_need_no_option_and_a_template_has_new_lines(run, labelled):
    words = labelled(40, "words.tsv", labels=["word7", "word8"])
    result = run(demonstrations=words, labels=None, template=r"word3 {text}\n{word}\n", json="-")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["settings"]["words"] == ["word7", "word8"]
    assert found["shots"][0]["demonstration_tokens"] == 2 * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": None}, "must be words, got '0', '1'"),
        ({"labels": "0=word1"}, "must be among '0', got '1'"),
        ({"labels": "0=word1,1"}, "--labels must give a word for each label"),
        ({"labels": "0=word1,0=word2"}, "--labels must give each label once, got '0' twice"),
        ({"labels": "0=good,1=bad"}, "must differ in their first token, got 'bad' and 'good'"),
        ({"shots": "2,many"}, "--shots must be comma-separated numbers"),
        ({"shots": "0,2"}, "shots must be from 1 to 2"),
        ({"shots": "60"}, "only 20 examples of 'word1', got 60"),
        ({"shots": "40"}, "all 40 are among the 40 demonstrations"),
        ({"template": "{text}"}, "template must contain {text} and then {word}"),
        ({"demonstrations": "/no/such.tsv"}, "'/no/such.tsv' does not exist"),
        ({"backend": "none", "store": "host=1GB"}, "--store needs a backend"),
        ({"json": "/no/such/folder/a.json"}, "mkdir -p /no/such/folder"),
    ],
)
def test_bad_input_is_named_with_what_to_do(run, changes, message):
    result = run(**changes)
    assert isinstance(result.exception, InvalidArgumentError), result.output
    with pytest.raises(MemlongError, match=re.escape(message)):
        raise result.exception


def test_tests_of_another_task_are_refused(run, labelled):
    result = run(tests=labelled(9, "tests.tsv", labels="23"))
    assert "must be among '0', '1', got '2', '3'" in str(result.exception)
    result = run(label_column="middle")
    assert result.exit_code == 2
    assert "middle" in result.stderr
