"""``memlong needle`` on a tiny random model, which finds nothing, and how prompts are made."""

from __future__ import annotations

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from memlong.decoder.model import kernels
from memlong.errors import InvalidArgumentError, MemlongError
from memlong.evaluation import Answer, Filler, evaluate_needle, passkey_prompt
from memlong.evaluation.needle import named_keys_prompt, says


@pytest.fixture
def run(invoke):
    return lambda **changes: invoke("needle", **{"lengths": "100,150", "depths": "0,1", **changes})


def test_table_json_and_picture_show_the_grid(run, tmp_path):
    file, picture = tmp_path / "needle.json", tmp_path / "needle.png"
    result = run(json=file, plot=picture, trials=2)
    assert result.exit_code == 0, result.output
    assert "depth 0" in result.stdout
    found = json.loads(file.read_text(encoding="utf-8"))
    assert [(cell["length"], cell["depth"]) for cell in found["cells"]] == [
        (100, 0.0),
        (100, 1.0),
        (150, 0.0),
        (150, 1.0),
    ]
    assert all(cell["trials"] == 2 and cell["accuracy"] == 0 for cell in found["cells"])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_cannot_be_written_is_an_error_after_the_result(run, tmp_path):
    picture = tmp_path / "full.png"
    picture.symlink_to("/dev/full")
    result = run(plot=picture)
    assert isinstance(result.exception, InvalidArgumentError), result.output
    assert "No space left on device. The result is printed without the plot" in str(result.exception)
    assert "depth 0" in result.stdout


class Characters:
    """A tokenizer of single characters."""

    def __call__(self, text, **_):
        return type("Encoding", (), {"input_ids": [ord(letter) for letter in text]})

    def decode(self, ids):
        return "".join(chr(number) for number in ids)


class Answers:
    """A decoder that remembers nothing, and so has no sources."""

    tokenizer = Characters()
    banks = ()

    def sources(self):
        return nullcontext()


def test_a_prompt_begins_as_the_tokenizer_has_texts_begin():
    class Begins(Characters):
        def __call__(self, text, *, add_special_tokens, **_):
            return super().__call__("^" + text if add_special_tokens else text)

    words = Characters().decode(passkey_prompt(Begins(), 1000, 0.5, 12345)[0].tolist())
    assert len(words) == 1000
    assert words.startswith("^There is")
    assert words.count("^") == 1


@pytest.mark.parametrize("depth", [0, 0.3, 1])
def test_a_prompt_hides_the_key_at_its_depth_and_asks_for_it(depth):
    prompt = passkey_prompt(Characters(), 1000, depth, 12345)
    assert prompt.shape == (1, 1000)
    words = Characters().decode(prompt[0].tolist())
    assert words.endswith("What is the pass key? The pass key is")
    assert words.count("12345") == 2
    room = 1000 - len("There is an important pass key hidden inside a lot of irrelevant text. Find it.")
    assert abs(words.index("The pass key is 12345") / room - (0.1 + 0.85 * depth)) < 0.1


def test_the_one_who_knows_is_found_right(monkeypatch):
    class Knows(Answers):
        def reset(self):
            self.read = ""

        def stream(self, ids, **_):
            self.read += self.tokenizer.decode(ids[0].tolist())
            return []

        def generate(self, ids, *_, **__):
            start = self.read.index("The pass key is ") + len("The pass key is ")
            said = " " + self.read[start : start + (5 if "sky" in self.read[:start] else 4)] + ". Yes"
            return torch.tensor([[*ids[0].tolist(), *map(ord, said)]])

    cells = evaluate_needle(Knows(), [900], [0, 0.5, 1], trials=3)
    assert [cell.accuracy for cell in cells] == [0, 1, 1]


class Attends(Answers):
    """Says nothing of use, and attends to chunks of 100 characters, most to the one of the given number."""

    def __init__(self, attended, stored=9):
        self.attended, self.stored = attended, stored

    def reset(self):
        pass

    def stream(self, ids, **_):
        return []

    def generate(self, ids, *_, **__):
        return ids

    @property
    def banks(self):
        spans = torch.tensor([[100 * number, 100 * number + 100] for number in range(self.stored)])
        return (SimpleNamespace(ids=torch.arange(self.stored), spans_of=lambda ids: spans[ids]),)

    def sources(self):
        chunks = [SimpleNamespace(span=(100 * each, 100 * each + 100)) for each in (self.attended, 4, 5)]
        return nullcontext(SimpleNamespace(chunks=chunks))


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(
    ("attended", "stored", "source_named"),
    [(4, 9, True), (5, 9, True), (6, 9, False), (4, 5, True), (5, 5, True), (4, 4, None)],
)
def test_of_a_key_in_two_chunks_either_is_its_source(attended, stored, source_named, named):
    """A key that is not in memory has none."""
    (cell,) = evaluate_needle(Attends(attended, stored), [1000], [0.46], named=named, filler="word " * 100)
    (answer,) = cell.answers
    assert answer == Answer(right=False, source_named=source_named)


def test_without_a_chunk_that_was_attended_to_no_source_is_named():
    decoder = Attends(0)
    decoder.sources = lambda: nullcontext(SimpleNamespace(chunks=[]))
    (cell,) = evaluate_needle(decoder, [1000], [0.46], filler="word " * 100)
    assert cell.answers == (Answer(right=False, source_named=False),)


def test_the_command_tells_how_often_the_key_is_the_source(run, tmp_path):
    file = tmp_path / "needle.json"
    result = run(json=file, depths="0,1", trials=2, local_window=48, top_k=8)
    assert result.exit_code == 0, result.output
    found = json.loads(file.read_text(encoding="utf-8"))
    told = [[each["source_named"] for each in cell["answers"]] for cell in found["cells"]]
    assert all(isinstance(each, bool) for each in told[0] + told[2])
    assert told[1] == told[3] == [None, None]  # they are in the window
    share = found["source_named"]["answers"]
    assert (share["count"], share["trials"]) == (sum(told[0] + told[2]), 4)
    assert found["source_named"]["right_answers"] is None
    assert "Of 4 answers with the key in memory," in result.stdout


def test_attention_that_does_not_tell_answers_all_the_same(run, tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "is_plain", lambda *_: False)
    file = tmp_path / "needle.json"
    result = run(json=file)
    assert result.exit_code == 0, result.output
    found = json.loads(file.read_text(encoding="utf-8"))
    assert [cell["answers"] for cell in found["cells"]] == [[{"right": False, "source_named": None}]] * 4
    assert found["source_named"] == {"answers": None, "right_answers": None}


def test_named_keys_hide_in_one_text_and_each_is_asked_for():
    depths, keys = [0, 0.4, 1], {"amber anchor": 11111, "brass bridge": 22222, "cedar candle": 33333}
    text, questions = named_keys_prompt(Characters(), 1000, depths, keys)
    words = Characters().decode(text[0].tolist())
    asked = [Characters().decode(question[0].tolist()) for question in questions]
    assert len(words) + max(map(len, asked)) == 1000
    places = [words.index(f"The pass key of the {name} is {key}.") for name, key in keys.items()]
    assert places == sorted(places)
    assert abs(places[1] / len(words) - 0.45) < 0.1
    assert all(
        each.endswith(f"The pass key of the {name} is") for name, each in zip(keys, asked, strict=True)
    )


def test_a_text_without_an_end_hides_keys_at_their_depths():
    prompt, _ = named_keys_prompt(
        Characters(), 3000, [0, 0.5, 1], {"a": 11111, "b": 22222, "c": 33333}, "word " * 2000
    )
    words = "".join(map(chr, prompt[0].tolist()))
    places = [words.index(f"The pass key of the {name} is") / 3000 for name in "abc"]
    assert places == pytest.approx([0.05, 0.5, 0.95], abs=0.06)


@pytest.mark.parametrize("end", ["\n", " "])
@pytest.mark.parametrize("sentences", [3, 400])
def test_any_text_hides_keys_at_their_depths_between_sentences_and_is_not_repeated_early(sentences, end):
    filler = end.join(f"Sentence {number} is here." for number in range(sentences)) + end
    depths = [0, 0.25, 0.5, 0.75, 1]
    keys = {f"thing{number}": 10_000 + number for number in range(len(depths))}
    prompt, _ = named_keys_prompt(Characters(), 3000, depths, keys, filler)
    words = "".join(map(chr, prompt[0].tolist()))
    hay = words[words.index("Sentence 0") if sentences == 400 else words.index("them.") :]
    for depth, (name, key) in zip(depths, keys.items(), strict=True):
        needle = words.index(f"The pass key of the {name} is {key}")
        assert abs((needle - 100) / 2800 - depth) < 0.15
        assert depth == 1 or words[:needle].rstrip().endswith(".")
    if sentences == 400:
        assert hay.count("Sentence 0 ") == 1


@pytest.mark.parametrize(
    ("depths", "message"),
    [([1, 0], "must ascend"), ([0.5], "one for each of the 2"), ([0, 1.5], "from 0 to 1")],
)
def test_depths_of_named_keys_must_ascend(depths, message):
    with pytest.raises(InvalidArgumentError, match=message):
        named_keys_prompt(Characters(), 1000, depths, {"anchor": 11111, "bridge": 22222})


def test_named_keys_are_asked_for_from_one_reading():
    class Knows(Answers):
        read = 0

        def reset(self):
            self.read += 1

        def stream(self, ids, **_):
            self.text = self.tokenizer.decode(ids[0].tolist())
            return []

        def generate(self, ids, *_, remember, **__):
            assert not remember
            asked = self.tokenizer.decode(ids[0].tolist()).rpartition("The pass key of the ")[2]
            start = self.text.index(asked) + len(asked)
            said = self.text[start : start + 6] if "of the" in self.text[: start - len(asked) - 7] else " 1"
            return torch.tensor([[*ids[0].tolist(), *map(ord, said)]])

    decoder = Knows()
    cells = evaluate_needle(decoder, [900, 1200], [1, 0, 0.5], trials=2, named=True)
    assert decoder.read == 4
    assert [(cell.length, cell.depth) for cell in cells] == [(n, d) for n in (900, 1200) for d in (0, 0.5, 1)]
    assert [cell.accuracy for cell in cells] == [0, 1, 1] * 2


def test_the_command_hides_named_keys(run, tmp_path):
    file = tmp_path / "needle.json"
    result = run(lengths="200", json=file, named=True)
    assert result.exit_code == 0, result.output
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["named"]
    assert [cell["depth"] for cell in found["cells"]] == [0, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": "100,many"}, "--lengths must be comma-separated numbers"),
        ({"depths": "2"}, "--depths must be numbers from 0 to 1, got '2'"),
        ({"lengths": "99999999999"}, "length must be at most 100,000,000"),
        ({"lengths": "20"}, "for opening, pass keys and question, got 20"),
        ({"lengths": "80,10"}, "for opening, pass keys and question, got 10"),
        ({"lengths": "250,40", "named": True}, "for opening, pass keys and question, got 40"),
        (
            {"named": True, "depths": ",".join(map(str, [k / 21 for k in range(21)]))},
            "depths must be at most 20",
        ),
        ({"plot": "out.foo"}, "must end in .png, .svg or .pdf"),
        ({"plot": "out.png", "json": "out.png"}, "--plot and --json must be different files, got 'out.png'"),
        ({"plot": "/no/such/folder/a.png"}, "mkdir -p /no/such/folder"),
    ],
)
def test_bad_input_is_named_with_what_to_do(run, changes, message):
    result = run(**changes)
    assert isinstance(result.exception, InvalidArgumentError), result.output
    with pytest.raises(MemlongError, match=message):
        raise result.exception


@pytest.mark.parametrize("named", [False, True])
def test_the_filler_is_tokenized_once(named):
    class Counts(Characters):
        def __call__(self, text, **options):
            seen.append(text)
            return super().__call__(text, **options)

    class Reads(Answers):
        tokenizer = Counts()

        def reset(self):
            pass

        def stream(self, ids, **_):
            return []

        def generate(self, ids, *_, **__):
            return ids

    seen = []
    filler = "".join(f"Line {number} is hay.\n" for number in range(30))
    evaluate_needle(Reads(), [900, 1200], [0, 0.5, 1], trials=2, filler=filler, named=named)
    lines = [text for text in seen if "is hay" in text]
    assert len(lines) == len(set(lines)) == 30


def test_a_tokenized_filler_makes_the_same_prompts():
    text = "A line.\n" + "A long one. " * 20
    filler = Filler.of(Characters(), text)
    for depth in (0, 0.4, 1):
        expected = passkey_prompt(Characters(), 1000, depth, 12345, text)
        assert passkey_prompt(Characters(), 1000, depth, 12345, filler).equal(expected)


@pytest.mark.parametrize(
    ("answer", "is_right"),
    [
        (" 12345.", True),
        ("12345", True),
        ("12345\n67", True),
        ("123456", False),
        ("It is 12345", False),
        ("", False),
    ],
)
def test_a_longer_number_is_another_key(answer, is_right):
    assert says(answer, "12345") is is_right
