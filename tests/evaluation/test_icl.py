"""In-context learning: how files are read, what is drawn, and that what is asked is forgotten again."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from memlong import MemoryDecoder
from memlong.errors import InvalidArgumentError, InvalidTextError
from memlong.evaluation import Example, Task, accuracy_interval, draw_task, evaluate_icl, read_examples

WORDS = {"0": "negative", "1": "positive"}
FILM = [Example("a fine film", "positive"), Example("dull , and long", "negative")]
FILM += [Example("fine", "positive"), Example("no", "negative")]
FORMS = {
    "tabs and a header": "sentence\tlabel\na fine film\t1\ndull , and long\t0\nfine\t1\nno\t0\n",
    "tabs alone": "a fine film\t1\ndull , and long\t0\nfine\t1\nno\t0",
    "commas, label first": '1,a fine film\n0,"dull , and long"\n1,fine\n0,no\n',
    "commas, a header, label last": 'text,label\na fine film,1\n"dull , and long",0\n\nfine,1\nno,0\n',
    "three columns": 'label,text,id\n1,a fine film,7\n0,"dull , and long",8\n1,fine,9\n0,no,6',
    "from a spreadsheet": '\ufeff1,a fine film\r\n0,"dull , and long"\r\n1,fine\r\n0,no\r\n',
}


@pytest.fixture
def file(tmp_path):
    def write(content):
        path = tmp_path / "examples.csv"
        path.write_text(content, encoding="utf-8", newline="")
        return path

    return write


@pytest.mark.parametrize("are_words", [False, True])
@pytest.mark.parametrize("content", FORMS.values(), ids=FORMS)
def test_every_form_of_a_file_gives_the_same_examples(file, content, are_words):
    if are_words:
        content = content.replace("1", "positive").replace("0", "negative")
    assert read_examples(file(content), labels=None if are_words else WORDS) == FILM


def test_the_column_of_the_label_can_be_told(file):
    path = file("good\tbad\nbad\tgood\ngood\tgood\nbad\tbad\n")
    assert [example.word for example in read_examples(path, label_column="first")] == ["good", "bad"] * 2
    assert [example.text for example in read_examples(path, label_column="last")] == ["good", "bad"] * 2


def test_a_file_of_one_row_goes_by_the_labels_that_are_known(file):
    assert read_examples(file("1,fine"), labels=WORDS) == [Example("fine", "positive")]
    assert read_examples(file("fine,1"), labels=WORDS) == [Example("fine", "positive")]


def test_quotes_in_a_file_with_tabs_are_text(file):
    assert read_examples(file('"fine" film\t1\n"no\t0\n'), labels=WORDS)[1].text == '"no'


def test_labels_can_share_a_word(file):
    labels = {"0": "bad", "1": "bad", "2": "good"}
    words = [example.word for example in read_examples(file("a\t0\nb\t1\nc\t2\nd\t0\n"), labels=labels)]
    assert words == ["bad", "bad", "good", "bad"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("fine\nno\n", "separated by a tab or comma, got one column"),
        ("fine\t1\nno\t0\t2\n", "must have 2 columns in every row, as in its first, got 3 in line 2"),
        ("fine\t1\n\t0\nno\t0\nno\t1\n", "has no text in line 2"),
        ('1,"fine\n0,no\n', r"is not valid CSV: .*\(line 2\)"),
        (
            "fine\t1\nno\t0\nso\t2\nso so\t2\n",
            r"must be among '0', '1', got '2'",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_the_reason(file, content, message):
    path = file(content)
    with pytest.raises(InvalidArgumentError, match=message) as raised:
        read_examples(path, labels=WORDS)
    assert str(path) in str(raised.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InvalidTextError, match=r"missing.tsv' does not exist"):
        read_examples(tmp_path / "missing.tsv")


def test_labels_that_are_no_words_need_words(file):
    with pytest.raises(InvalidArgumentError, match="must be words, got '0', '1'"):
        read_examples(file(FORMS["tabs and a header"]))
    with pytest.raises(InvalidArgumentError, match="label_column must be 'first' or 'last', got 'middle'"):
        read_examples(file(FORMS["tabs alone"]), label_column="middle")


def examples(each=30, words=("bad", "good", "so-so")):
    return [Example(f"{word} number {number}", word) for word in words for number in range(each)]


@pytest.mark.parametrize("shots", [1, 3, 7, 90])
def test_demonstrations_are_balanced_and_fewer_are_the_first_of_more(shots):
    tests = [Example("new", "bad")]
    few = draw_task(examples(), tests, shots=shots, seed=3).demonstrations
    assert few == draw_task(examples(), tests, shots=90, seed=3).demonstrations[:shots]
    counts = Counter(example.word for example in few)
    assert max(counts.values()) - min(counts[word] for word in ("bad", "good", "so-so")) <= 1
    assert len(set(few)) == shots


def test_the_seed_draws_and_words_come_in_any_order():
    drawn = [draw_task(examples(), shots=12, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len({drawn[0].demonstrations[turn].word for turn in (0, 3, 6, 9)}) > 1


def test_no_test_is_a_demonstration():
    task = draw_task(examples(), shots=60, test_limit=1000)
    assert len(task.tests) == 30
    assert not set(task.tests) & set(task.demonstrations)
    again = draw_task(examples(), examples(), shots=60, test_limit=10)
    assert again.tests == task.tests[:10]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shots": 91}, "shots must be at most 90, .* only 30 examples of 'bad', got 91"),
        ({"shots": 0}, "shots and test_limit must be at least 1, got 0 and 200"),
        ({"shots": 90}, "all 90 are among the 90 demonstrations"),
        ({"examples": examples(words=("good",))}, "got one for all 30: 'good'"),
        ({"tests": [Example("new", "odd")]}, "must have labels of the demonstrations .* got 'odd'"),
    ],
)
def test_what_cannot_be_drawn_is_explained(changes, message):
    given = {"examples": examples(), "tests": None, "shots": 6, **changes}
    with pytest.raises(InvalidArgumentError, match=message):
        draw_task(given["examples"], given["tests"], shots=given["shots"])


def test_the_majority_is_the_word_that_most_tests_have():
    tests = tuple(Example(str(number), "good" if number % 3 else "bad") for number in range(9))
    assert Task(("bad", "good"), (), tests).majority == ("good", 6 / 9)


class Letters:
    """A tokenizer of single characters, for a model that knows 97 tokens."""

    def __call__(self, text, **_):
        return type("Encoding", (), {"input_ids": [3 + ord(letter) % 94 for letter in text]})


@pytest.fixture
def task():
    pool = [Example(f"text {number * number}", "bad" if number % 2 else "good") for number in range(20)]
    return draw_task(pool, shots=8, test_limit=6)


@pytest.fixture
def letters():
    """Without the space before the word, which is where the answer begins for a tokenizer of characters."""
    return "Review: {text}\nSentiment:{word}\n\n"


@pytest.mark.parametrize("calibrate", [False, True])
def test_within_the_plain_window_it_is_the_plain_model(llama, small, task, letters, calibrate):
    with MemoryDecoder(llama, Letters(), small(backend=None, local_window=400)) as decoder:
        (result,) = evaluate_icl(decoder, task, [4], template=letters, calibrate=calibrate)
    shown = "".join(f"Review: {each.text}\nSentiment:{each.word}\n\n" for each in task.demonstrations[:4])
    first = Letters()("bg").input_ids  # of "bad" and of "good"

    def plain(text):
        ids = Letters()(f"{shown}Review: {text}\nSentiment:").input_ids
        with torch.no_grad():
            return llama(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[first]

    base = plain("N/A") if calibrate else 0
    expected = tuple(task.words[int((plain(test.text) - base).argmax())] for test in task.tests)
    assert result.predictions == expected
    assert result.accuracy.value == np.mean(
        [said == test.word for said, test in zip(expected, task.tests, strict=True)]
    )


@pytest.mark.parametrize("backend", ["torch", None])
def test_tests_know_nothing_of_each_other(llama, small, task, letters, backend):
    config = small(backend=backend, segment_size=20)
    with MemoryDecoder(llama, Letters(), config) as decoder:
        (together,) = evaluate_icl(decoder, task, [8], template=letters)
        read, stored = decoder.tokens_read, [len(bank) for bank in decoder.banks]
        alone = []
        for test in reversed(task.tests):
            one = Task(task.words, task.demonstrations, (test,))
            alone += evaluate_icl(decoder, one, [8], template=letters)[0].predictions
    assert together.predictions == tuple(reversed(alone))
    assert read == (together.demonstration_tokens,)
    assert (backend is None) == (stored == [])
    assert all(count > 10 for count in stored)


def test_each_number_of_shots_is_a_stream_of_its_own(llama, small, task, letters):
    answered = []
    with MemoryDecoder(llama, Letters(), small(segment_size=20)) as decoder:
        both = evaluate_icl(decoder, task, [2, 8], template=letters, progress=answered.append)
        (many,) = evaluate_icl(decoder, task, [8], template=letters)
    assert [result.shots for result in both] == [2, 8]
    assert both[0].demonstration_tokens < both[1].demonstration_tokens == many.demonstration_tokens
    assert both[1].predictions == many.predictions
    assert sum(answered) == 2 * len(task.tests)


@pytest.mark.parametrize("backend", ["torch", None])
def test_demonstrations_beyond_the_window_count_only_with_a_memory(llama, small, task, letters, backend):
    found = set()
    with MemoryDecoder(llama, Letters(), small(backend=backend, top_k=64, segment_size=20)) as decoder:
        for mark in "?x7":
            # What the window holds knows of what stood before it, a window a layer: change what is older.
            first = tuple(Example(mark * len(each.text), each.word) for each in task.demonstrations[:3])
            other = Task(task.words, first + task.demonstrations[3:], task.tests)
            found.add(evaluate_icl(decoder, other, [8], template=letters, calibrate=True)[0].predictions)
    assert (len(found) == 1) == (backend is None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shots": [9]}, "shots must be from 1 to 8, .* got 9"),
        ({"shots": [0]}, "shots must be from 1 to 8, .* got 0"),
        ({"template": "{word}: {text}"}, "template must contain {text} and then {word}, once each"),
        ({"template": "{text}{text}: {word}"}, "template must contain {text} and then {word}, once each"),
        ({"template": "{text}: {word}\n"}, "must differ in their first token, got 'bad' and 'good'"),
    ],
)
def test_what_cannot_be_asked_is_explained(llama, small, task, letters, changes, message):
    given = {"shots": [2], "template": letters, **changes}
    with (
        MemoryDecoder(llama, Letters(), small()) as decoder,
        pytest.raises(InvalidArgumentError, match=message),
    ):
        evaluate_icl(decoder, task, given["shots"], template=given["template"])


def test_a_word_that_the_tokenizer_joins_to_the_question_is_refused(llama, small, task, letters):
    class Lines(Letters):
        def __call__(self, text, **_):
            return type("Encoding", (), {"input_ids": [len(line) for line in text.split("\n")]})

    with (
        MemoryDecoder(llama, Lines(), small()) as decoder,
        pytest.raises(InvalidArgumentError, match="merges the word 'bad' with the end of the question"),
    ):
        evaluate_icl(decoder, task, [2], template=letters)


def test_the_interval_of_an_accuracy_covers_it_about_as_often_as_it_says():
    covered = 0
    for seed in range(100):
        found = accuracy_interval(np.random.default_rng(seed).random(200) < 0.8, samples=300, seed=seed)
        covered += found.low <= 0.8 <= found.high
    assert 85 <= covered <= 100
    assert accuracy_interval(np.ones(5, dtype=bool)).low == 1
    with pytest.raises(InvalidArgumentError, match="at least one answer"):
        accuracy_interval(np.zeros(0, dtype=bool))


@pytest.mark.parametrize("content", ["\ufeff", "\ufeff\n", ",\n,\n"])
def test_a_file_of_nothing_is_empty(file, content):
    with pytest.raises(InvalidTextError, match="is empty"):
        read_examples(file(content))


def test_a_text_beyond_the_limit_of_csv_is_told_from_wrong_quotes(tmp_path):
    path = tmp_path / "examples.csv"
    path.write_text('text,label\n"never closed,0\n' + "a good text,1\n" * 20_000, encoding="utf-8")
    with pytest.raises(InvalidTextError, match="close an open quote"):
        read_examples(path)
