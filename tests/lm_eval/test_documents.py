"""Questions on documents: prompts are full and hold what is asked for, and files of another form are refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from lm_eval.tasks.ruler import qa_utils

from memlong.errors import InvalidArgumentError, InvalidTextError
from memlong.lm_eval.tasks import documents
from memlong.lm_eval.tasks.documents import SOURCES, Question, read_documents

DOCUMENT = 22  # tokens of a document of the fixtures in a prompt, at most


def rows(name, given, **changes):
    return documents.dataset(ruler=name, **given | changes)["test"].to_list()


def read(name, path):
    return read_documents(SOURCES[name], str(path))


def content(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def written(path, found):
    path.write_text(found if isinstance(found, str) else json.dumps(found), encoding="utf-8")
    return path


def documents_of(row):
    """Return the documents of a prompt, and its question."""
    told = row["input"].split("The following are given documents.\n\n")[1]
    told, question = told.split("\n\nAnswer the question based on the given documents.")
    return re.split(r"(?:\n\n)?Document \d+:\n", told)[1:], question.split("Question: ")[1]


# --- What is read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "reader"), [("qa_1", "read_squad"), ("qa_2", "read_hotpotqa")])
def test_questions_are_those_that_lm_eval_reads(name, reader, given, monkeypatch):
    path = given[SOURCES[name].key]
    monkeypatch.setattr(qa_utils, "download_json", lambda url: content(path))
    theirs, texts = getattr(qa_utils, reader).__wrapped__()
    expected = [
        (each["query"], tuple(each["outputs"]), tuple(texts[place] for place in each["context"]))
        for each in theirs
    ]
    found = read(name, path)
    assert found[0] == texts
    assert [(each.text, each.answers, each.documents) for each in found[1]] == expected


def test_paragraphs_of_an_article_are_near(squad):
    texts, questions = read("qa_1", squad)
    for each in questions:
        article = each.text.split()[-1].split("-")[0]
        assert set(each.near) == {text for text in texts if text.startswith(f"The box {article}-")}


def test_older_squad_has_no_questions_without_an_answer(squad, tmp_path):
    found = content(squad)
    for article in found["data"]:
        for paragraph in article["paragraphs"]:
            paragraph["qas"] = [
                {key: value for key, value in each.items() if key != "is_impossible"}
                for each in paragraph["qas"]
                if not each["is_impossible"]
            ]
    assert read("qa_1", written(tmp_path / "old.json", found)) == read("qa_1", squad)


def test_hotpotqa_as_the_hub_has_it(hotpotqa, tmp_path):
    found = content(hotpotqa)
    for each in found:
        titles, sentences = zip(*each["context"], strict=True)
        each["context"] = {"title": titles, "sentences": sentences}
        needed, places = zip(*each["supporting_facts"], strict=True)
        each["supporting_facts"] = {"title": needed, "sent_id": places}
    assert read("qa_2", written(tmp_path / "hub.json", found)) == read("qa_2", hotpotqa)


def test_blanks_around_answers_are_cut_and_blank_answers_left_out(tmp_path):
    found = [HOTPOTQA[0] | {"answer": " one "}, HOTPOTQA[0] | {"answer": " "}]
    _, questions = read("qa_2", written(tmp_path / "blank.json", found))
    assert questions == [Question("q", ("one",), ("t\ns",))]


# --- Prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOURCES)
def test_prompts_are_full_and_hold_what_their_question_is_about(name, given):
    _, questions = read(name, given[SOURCES[name].key])
    by_text = {each.text: each for each in questions}
    for row in rows(name, given, samples=10, max_seq_lengths=[2048, 1024]):
        tokens = len(f"{row['input']} {row['gen_prefix']}".split()) + 32
        assert row["max_length"] - DOCUMENT - 3 <= tokens <= row["max_length"]
        texts, question = documents_of(row)
        assert len({*texts}) == len(texts)
        assert {*by_text[question].documents} <= {*texts}
        assert tuple(row["outputs"]) == by_text[question].answers
        if name == "qa_1":
            assert {*by_text[question].near} <= {*texts}


@pytest.mark.parametrize("name", SOURCES)
def test_longer_prompts_ask_the_same_and_hold_the_documents_of_shorter_ones(name, given):
    made = rows(name, given, samples=5)
    for short, long in zip(made[::2], made[1::2], strict=True):
        assert (short["max_length"], long["max_length"]) == (1024, 2048)
        (few, question), (many, same) = documents_of(short), documents_of(long)
        assert question == same
        assert {*few} < {*many}


def test_where_a_document_stands_is_drawn(given):
    places = []
    for row in rows("qa_2", given, samples=20, max_seq_lengths=1024):
        texts, question = documents_of(row)
        (box,) = re.findall(r"box (\S+)\?", question)
        places.append(next(n for n, text in enumerate(texts) if f"Box {box}\n" in text) / len(texts))
    assert min(places) < 0.2 < 0.8 < max(places)


@pytest.mark.parametrize("name", SOURCES)
def test_questions_are_drawn(name, given):
    in_order = [each.text for each in read(name, given[SOURCES[name].key])[1][:5]]
    asked = [
        [documents_of(row)[1] for row in rows(name, given, samples=5, seed=seed, max_seq_lengths=1024)]
        for seed in (0, 1)
    ]
    assert in_order != asked[0] != asked[1] != in_order


def test_questions_whose_documents_do_not_fit_are_not_asked_at_any_length(hotpotqa, given, tmp_path):
    found = content(hotpotqa)
    for each in found[:15]:
        each["context"][0][1] = ["word " * 1500]
    path = str(written(tmp_path / "some.json", found))
    made = rows("qa_2", given, hotpotqa=path, samples=5)
    assert [row["max_length"] for row in made] == [1024, 2048] * 5
    assert {documents_of(row)[1] for row in made} == {each["question"] for each in found[15:]}
    assert len(rows("qa_2", given, hotpotqa=path, samples=500, max_seq_lengths=2048)) == 20
    with pytest.raises(
        InvalidArgumentError,
        match=r"^None of 1 questions fits with its documents into a prompt of 1,024 tokens",
    ):
        rows("qa_2", given, hotpotqa=str(written(tmp_path / "none.json", found[:1])), max_seq_lengths=1024)


def test_one_right_answer_is_enough_in_any_case_of_letters():
    doc = {"max_length": 2048, "outputs": ["Stone 3", "Stone"]}
    assert documents.process_results(doc, ["\x00 a stone"]) == {"2048": 1.0}
    assert documents.process_results(doc, ["A STONE"]) == {"2048": 1.0}
    assert documents.process_results(doc, ["A box"]) == {"2048": 0.0}


# --- Other files ------------------------------------------------------------------------------------------------------

QUESTION = {"question": "q", "answers": [{"text": "a"}]}
SQUAD = {"data": [{"paragraphs": [{"context": "c", "qas": [QUESTION]}]}]}
HOTPOTQA = [{"question": "q", "answer": "a", "context": [["t", ["s"]]]}]


def squad_with(context="c", **changes):
    return {"data": [*SQUAD["data"], {"paragraphs": [{"context": context, "qas": [QUESTION | changes]}]}]}


def hotpotqa_with(**changes):
    return [*HOTPOTQA, HOTPOTQA[0] | changes]


@pytest.mark.parametrize(
    ("name", "found", "message"),
    [
        ("qa_1", "{", r"cannot be read as 'squad': JSONDecodeError: .*\. Pass SQuAD's dev-v2.0.json or"),
        ("qa_1", "[" * 100_000, "RecursionError"),
        ("qa_1", HOTPOTQA, "read as 'squad': TypeError: expected an object with a list of articles as 'data'"),
        ("qa_1", {"data": None}, "a list of articles as 'data'"),
        ("qa_1", squad_with(context=" "), r"at place 1: TypeError: expected a text, got ' '"),
        ("qa_1", squad_with(question=3), "at place 1: TypeError: expected a text, got 3"),
        ("qa_1", squad_with(answers=[{"text": 3}]), "at place 1: AttributeError"),
        ("qa_1", squad_with(answers={"text": ["a"]}), "at place 1: TypeError"),
        ("qa_1", {"data": [{"paragraphs": [{"context": "c"}]}]}, "at place 0: KeyError: 'qas'"),
        ("qa_1", squad_with() | {"data": [{"paragraphs": []}]}, "has no question with an answer: pass SQuAD's"),
        ("qa_1", {"data": [{"paragraphs": [{"context": "c", "qas": [QUESTION | {"is_impossible": True}]}]}]},
         "has no question with an answer"),
        ("qa_2", SQUAD, r"read as 'hotpotqa': TypeError: expected a list of questions\. Pass HotpotQA's hotpot_"),
        ("qa_2", hotpotqa_with(answer=3), "at place 1: AttributeError"),
        ("qa_2", hotpotqa_with(question=""), "at place 1: TypeError: expected a text, got ''"),
        ("qa_2", hotpotqa_with(context=[]), "at place 1: ValueError: a question without documents"),
        ("qa_2", hotpotqa_with(context=[[None, ["s"]]]), "at place 1: TypeError: expected a text, got None"),
        ("qa_2", hotpotqa_with(context=[["t", [3]]]), "at place 1: TypeError"),
        ("qa_2", hotpotqa_with(context={"title": ["t"], "sentences": []}), "at place 1: ValueError"),
        ("qa_2", hotpotqa_with(supporting_facts=[["t", 0], ["u", 0]]),
         "at place 1: ValueError: the question lacks the document 'u', which its answer needs, as in"),
        ("qa_2", hotpotqa_with(supporting_facts={"title": ["u"], "sent_id": [0]}), "lacks the document 'u'"),
        ("qa_2", hotpotqa_with(supporting_facts=[["t"]]), "at place 1: ValueError"),
        ("qa_2", [], "has no question with an answer"),
    ],
)  # fmt: skip
def test_content_of_another_form_is_refused_with_its_place(name, found, message, tmp_path):
    with pytest.raises(InvalidTextError, match=message):
        read(name, written(tmp_path / "other.json", found))


def test_a_file_must_be_named_and_there(given):
    message = r"^This task asks questions on documents: pass the path of SQuAD's .* as 'squad' in the metadata, got "
    for path in (None, ["a", "b"], 3):
        with pytest.raises(InvalidArgumentError, match=message):
            rows("qa_1", given, squad=path)
    with pytest.raises(InvalidTextError, match=r"^The text file 'nowhere.json' does not exist"):
        rows("qa_2", given, hotpotqa="nowhere.json")


def test_all_documents_must_fill_a_prompt(given, tmp_path):
    words = {"question": "q", "answer": "a", "context": [["t", ["word " * 1023]]]}
    path = written(tmp_path / "few.json", [words])
    with pytest.raises(
        InvalidArgumentError, match=r"documents of 'hotpotqa' together have 1,024 tokens, fewer than"
    ):
        rows("qa_2", given, hotpotqa=str(path), max_seq_lengths=1025)
    with pytest.raises(InvalidArgumentError, match="None of 1 questions fits"):
        rows("qa_2", given, hotpotqa=str(path), max_seq_lengths=1024)
