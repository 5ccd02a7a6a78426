"""Questions on documents are those that lm-eval would download, drawn by the random seed; other files are refused."""

from __future__ import annotations

import json
import re
from inspect import unwrap
from pathlib import Path

import pytest

from memlong.errors import InvalidArgumentError, InvalidTextError
from memlong.lm_eval.tasks import ruler
from memlong.lm_eval.tasks.documents import SOURCES, read_documents
from memlong.lm_eval.tasks.given import given_by


def rows(name, given, **changes):
    return ruler.dataset(ruler=name, **given | changes)["test"].to_list()


def read(name, path, given):
    return read_documents(SOURCES[name], str(path), given_by(given))


def written(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


@pytest.mark.parametrize(("name", "reader"), [("qa_1", "read_squad"), ("qa_2", "read_hotpotqa")])
def test_questions_are_those_that_lm_eval_reads(name, reader, given, monkeypatch):
    path = given[SOURCES[name].key]
    module = ruler._modules()["qa_utils"]
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    monkeypatch.setattr(module, "download_json", lambda url: content)
    questions, texts = unwrap(getattr(module, reader))()
    found = read(name, path, given)
    assert (found.questions, found.texts) == (questions, texts)


def test_older_squad_and_questions_without_an_answer(squad, given, tmp_path):
    content = json.loads(squad.read_text(encoding="utf-8"))
    for article in content["data"]:
        for paragraph in article["paragraphs"]:
            for each in paragraph["qas"]:
                each.pop("is_impossible", None)
    assert read("qa_1", written(tmp_path / "old.json", content), given) == read("qa_1", squad, given)


def test_blank_answers_are_left_out_as_they_would_always_be_right(squad, given, tmp_path):
    content = json.loads(squad.read_text(encoding="utf-8"))
    for article in content["data"]:
        for paragraph in article["paragraphs"]:
            paragraph["qas"][1]["answers"].append({"text": " "})
    assert read("qa_1", written(tmp_path / "blank.json", content), given) == read("qa_1", squad, given)


def test_hotpotqa_as_the_hub_has_it(hotpotqa, given, tmp_path):
    content = json.loads(hotpotqa.read_text(encoding="utf-8"))
    for each in content:
        titles, sentences = zip(*each["context"], strict=True)
        each["context"] = {"title": titles, "sentences": sentences}
    assert read("qa_2", written(tmp_path / "hub.json", content), given) == read("qa_2", hotpotqa, given)


@pytest.mark.parametrize("name", SOURCES)
def test_a_prompt_holds_the_documents_of_its_question(name, given):
    for row in rows(name, given, samples=5):
        documents = re.findall(r"^Document \d+:$", row["input"], flags=re.MULTILINE)
        assert len(documents) == {1024: 30, 2048: 70}[row["max_length"]]
        (box,) = re.findall(r"Question: \w+ \w+ box (\S+)\?$", row["input"])
        assert f"ox {box}" in row["input"].rsplit("Question: ", 1)[0]
        assert row["outputs"][0].endswith(box)
        if name == "qa_2":
            assert all(f"Box {box[:-2]}-{part}\n" in row["input"] for part in range(5))


@pytest.mark.parametrize("name", SOURCES)
def test_questions_are_drawn_and_the_same_of_every_length(name, given):
    made = rows(name, given, samples=5)
    asked = {
        length: [row["outputs"] for row in made if row["max_length"] == length] for length in (1024, 2048)
    }
    assert asked[1024] == asked[2048]
    in_order = [each["outputs"] for each in read(name, given[SOURCES[name].key], given).questions[:5]]
    other = [row["outputs"] for row in rows(name, given, samples=5, seed=1, max_seq_lengths=1024)]
    assert in_order != asked[1024] != other != in_order


def test_no_more_prompts_than_questions(given):
    assert len(rows("qa_2", given, samples=500, max_seq_lengths=1024)) == 20


def test_one_right_answer_is_enough():
    doc = {"max_length": 2048, "outputs": ["stone 3", "stone"]}
    assert ruler.process_answers(doc, ["A Stone"]) == {"2048": 1.0}
    assert ruler.process_answers(doc, ["A box"]) == {"2048": 0.0}


SQUAD = {"data": [{"paragraphs": [{"context": "c", "qas": [{"question": "q", "answers": [{"text": "a"}]}]}]}]}
HOTPOTQA = [{"question": "q", "answer": "a", "context": [["t", ["s"]]]}]


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("qa_1", "{", InvalidTextError, r"not in the expected format \(JSONDecodeError: .*name SQuAD's dev-v2.0.json"),
        ("qa_1", "[" * 100_000, InvalidTextError, r"not in the expected format \(RecursionError"),
        ("qa_1", HOTPOTQA, InvalidTextError, r"expected format \(TypeError"),
        ("qa_2", SQUAD, InvalidTextError, r"expected format \(TypeError.*name HotpotQA's hotpot_dev_distractor_v1"),
        ("qa_2", [HOTPOTQA[0] | {"answer": 3}], InvalidTextError, "expected a text, got 3"),
        ("qa_2", [HOTPOTQA[0] | {"context": {"title": ["t"], "sentences": []}}], InvalidTextError, "ValueError"),
        ("qa_2", [HOTPOTQA[0] | {"answer": ""}], InvalidTextError, "has no question with an answer"),
        ("qa_2", [], InvalidTextError, "has no question with an answer: name HotpotQA's"),
        ("qa_1", SQUAD, InvalidArgumentError, "have 1 tokens, too few to fill a prompt of 2,048: name a file with"),
    ],
)  # fmt: skip
def test_other_files_are_refused(name, content, error, message, given, tmp_path):
    path = written(tmp_path / "other.json", content)
    with pytest.raises(error, match=message):
        rows(name, given, **{SOURCES[name].key: str(path)})


def test_a_file_must_be_named_and_there(given):
    with pytest.raises(
        InvalidArgumentError, match=r"no file with them is named: name SQuAD's .* in the metadata 'squad'"
    ):
        rows("qa_1", given, squad=None)
    with pytest.raises(InvalidTextError, match=r"'nowhere.json' does not exist"):
        rows("qa_2", given, hotpotqa="nowhere.json")


def test_documents_that_never_fit_are_told_of(given, tmp_path):
    long = {"question": "q", "answer": "a", "context": [["t", ["word " * 1500]]]}
    path = written(tmp_path / "long.json", [long])
    with pytest.raises(
        InvalidArgumentError, match=r"fits into a prompt of 1,024 tokens: take longer max_seq_le"
    ):
        rows("qa_2", given, hotpotqa=str(path), max_seq_lengths=1024)
