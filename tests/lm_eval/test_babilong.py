"""BABILong: facts in order in a book that goes on between them, and one right answer."""

from __future__ import annotations

import re

import pytest

from memlong.errors import InvalidArgumentError, InvalidTextError
from memlong.lm_eval.tasks import babilong
from memlong.lm_eval.tasks.babi import Question, read_questions


def stories(given, task=1):
    return babilong.dataset(babilong=task, **given)["test"].to_list()


def tokens(text):
    return len(text.split())


def test_questions_are_read_with_the_facts_before_them(tmp_path):
    lines = [
        "1 A is here.",
        "2 Where is A? \there\t1",
        "3 A left.",
        "4 Where is A? \taway\t3",
        "1 B.",
        "2 C? \td\t1",
    ]
    (tmp_path / "qa1_test.txt").write_text("\n".join(lines), encoding="utf-8")
    assert read_questions(str(tmp_path), 1) == [
        Question(("A is here.",), "Where is A?", "here"),
        Question(("A is here.", "A left."), "Where is A?", "away"),
        Question(("B.",), "C?", "d"),
    ]


@pytest.mark.parametrize("task", babilong.INSTRUCTIONS)
def test_facts_stand_in_order_among_sentences_in_order_and_the_question_is_last(task, given):
    known = read_questions(given["babi"], task)
    for row in stories(given, task):
        assert row["max_length"] - 40 <= tokens(row["input"]) <= row["max_length"] - 16
        assert row["input"].endswith(f"\n\nQuestion: {row['question']}\nAnswer:")
        text = row["input"].split("The book with the facts:\n")[1]
        facts = tuple(re.findall(r"\w+ moved to the \w+\.", text))
        assert Question(facts, row["question"], row["outputs"][0]) in known
        told = [int(number) for number in re.findall(r"Sentence (\d+) of", text)]
        assert told == [(told[0] + step) % 3000 for step in range(len(told))]


def test_facts_lie_anywhere_in_the_book(given):
    made = stories({**given, "samples": 20, "max_seq_lengths": [1024]})
    places = [
        row["input"].index(fact) for row in made for fact in re.findall(r"\w+ moved.*?\.", row["input"])[1:]
    ]
    ends = [len(row["input"]) for row in made]
    assert min(places) < 0.35 * min(ends)
    assert max(places) > 0.75 * min(ends)


def test_lengths_ask_the_same_questions_and_a_seed_asks_them_again(given):
    made = stories(given)
    assert [row["question"] for row in made[::2]] == [row["question"] for row in made[1::2]]
    assert stories(given) == made
    assert stories({**given, "seed": 1}) != made
    assert len(stories({**given, "samples": 500, "max_seq_lengths": [1024]})) == 20


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("garden", True),
        (" The Garden.\nQuestion: Where is the kitchen?", True),
        ("north of the hallway is the garden", True),
        ("kitchen", False),
        ("garden or kitchen", False),
        ("gardener", False),
        ("I do not know. The garden", False),
        ("", False),
    ],
)
def test_an_answer_names_the_right_thing_and_no_other(said, right):
    doc = {
        "question": "What is north of the hallway?",
        "outputs": ["garden"],
        "candidates": ["garden", "kitchen", "hallway"],
        "max_length": 1024,
    }
    assert babilong.process_results(doc, [said]) == {"1024": float(right)}


def test_a_story_that_fits_no_prompt_is_refused(given, tmp_path):
    lines = [f"{number} Mary moved to the garden." for number in range(1, 400)]
    (tmp_path / "qa1_test.txt").write_text(
        "\n".join([*lines, "400 Where is Mary?\tgarden\t1"]), encoding="utf-8"
    )
    with pytest.raises(InvalidArgumentError, match="No facts of bAbI's task 1 fit into a prompt of 1,024"):
        stories({**given, "babi": str(tmp_path)})


@pytest.mark.parametrize(
    ("named", "error", "message"),
    [
        (None, InvalidArgumentError, r"no folder with that is named: --metadata '{\"babi\":"),
        (
            "nowhere",
            InvalidTextError,
            r"must hold one file of test questions qa1_\*test.txt, and holds 0.*babi_qa",
        ),
    ],
)
def test_without_babi_it_says_where_that_is(named, error, message, given):
    with pytest.raises(error, match=message):
        stories({**given, "babi": named})


@pytest.mark.parametrize(
    "line", ["Where is Mary?", "2 Where is Mary? |garden|1", "2 Mary is here.\tgarden\t1"]
)
def test_lines_of_another_format_are_named(line, tmp_path):
    (tmp_path / "qa1_test.txt").write_text(f"1 Mary left.\n{line}\n", encoding="utf-8")
    with pytest.raises(InvalidTextError, match=r"Line 2 of .* is not in bAbI's format"):
        read_questions(str(tmp_path), 1)


def test_a_file_without_questions_is_refused(tmp_path):
    (tmp_path / "qa1_test.txt").write_text("1 Mary left.\n", encoding="utf-8")
    with pytest.raises(InvalidTextError, match="has no questions: take the file as bAbI has it"):
        read_questions(str(tmp_path), 1)
