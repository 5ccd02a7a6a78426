"""The tasks of examples/lm_eval: which examples are shown, and that they are read once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

import memlong.lm_eval  # noqa: F401 - registers the model
from memlong import MemoryDecoder

TASKS = Path(__file__).parent.parent.parent / "examples" / "lm_eval"
WORDS = {
    "sst2_local": ["negative", "positive"],
    "sst5_local": ["terrible", "bad", "okay", "good", "great"],
}


def tabbed(count, first=0):
    rows = [f"w{number % 90} w{number // 90} , film\t{number % 2}" for number in range(first, first + count)]
    return "\n".join(["sentence\tlabel", *rows])


@pytest.fixture
def files(tmp_path):
    """Small files as people have them, one with a header and one with quotes."""
    quoted = [f'{number % 5},"w{number % 90} w{number // 90} , ""film"""' for number in range(150)]
    contents = {"sst2_train": tabbed(300), "sst2_test": tabbed(12, 294), "sst5_train": "\n".join(quoted)}
    for name, content in contents.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    return {name: str(tmp_path / name) for name in contents}


@pytest.fixture
def tasks(files):
    return TaskManager(include_path=str(TASKS), include_defaults=False, metadata=files)


@pytest.fixture
def task(tasks):
    return lambda name: tasks.load([name])["tasks"][name]


def shown(task, document, shots):
    context, _, question = task.fewshot_context(document, shots).rpartition("Review: ")
    return context, question


@pytest.mark.parametrize("name", WORDS)
def test_every_test_sees_the_same_balanced_examples(task, name):
    made = task(name)
    contexts = {shown(made, document, 20)[0] for document in made.test_docs()}
    (context,) = contexts
    said = Counter(line.removeprefix("Sentiment: ") for line in context.splitlines()[1::3])
    assert said == dict.fromkeys(WORDS[name], 20 // len(WORDS[name]))
    few, _ = shown(made, made.test_docs()[0], 5)
    assert context.startswith(few)
    assert few.count("Review: ") == 5


@pytest.mark.parametrize("name", WORDS)
def test_a_test_is_asked_as_the_examples_are_shown(task, name):
    made = task(name)
    document = made.test_docs()[0]
    context, question = shown(made, document, 4)
    assert question == f"{document['text']}\nSentiment:"
    first = made.fewshot_docs()[0]
    assert context.startswith(
        f"Review: {first['text']}\nSentiment: {WORDS[name][first['label']]}\n\nReview: "
    )
    requests = made.construct_requests(document, "so", metadata=(name, 0, 1))
    assert [request.args[1] for request in requests] == [f" {word}" for word in WORDS[name]]


@pytest.mark.parametrize(("name", "tests"), [("sst2_local", 12), ("sst5_local", 30)])
def test_no_test_is_shown(task, name, tests):
    made = task(name)
    asked = {document["text"] for document in made.test_docs()}
    assert len(asked) == tests
    assert not asked & {document["text"] for document in made.fewshot_docs()}


def test_texts_are_read_as_they_are_written(task):
    assert all(", film" in document["text"] for document in task("sst2_local").test_docs())
    assert all(document["text"].endswith(', "film"') for document in task("sst5_local").test_docs())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "sst5_train is missing: name your file, as in --metadata"),
        ("1,fine\ngood,so so\n", r"a label from 0 to 4 in every row, got \['good', 'so so'\] in row 2"),
        ("1,fine\n2\n", r"a label from 0 to 4 in every row, got \['2'\] in row 2"),
        ("1,fine\n5,fine\n", r"a label from 0 to 4 in every row, got \['5', 'fine'\] in row 2"),
        ("1,fine\n2,so so\n", r"rows.csv must have examples of all 5 labels, and tests"),
    ],
)
def test_a_file_that_cannot_be_used_is_explained(tmp_path, content, message):
    (tmp_path / "rows.csv").write_text(content or "", encoding="utf-8")
    given = {} if content is None else {"sst5_train": str(tmp_path / "rows.csv")}
    with pytest.raises(ValueError, match=message):
        TaskManager(include_path=str(TASKS), include_defaults=False, metadata=given).load(["sst5_local"])


@pytest.mark.parametrize("name", ["sst2_local", "sst5_local"])
@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("sst2_dev", "sst2_test"),
        ("sst5_tests", "sst5_test"),
        ("sst_train", "sst._train"),
        ("sst2_trian", "sst2_train"),
    ],
)
def test_a_misspelled_key_is_refused_with_those_that_are_known(files, name, key, meant):
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=files | {key: "rows.txt"})
    with pytest.raises(
        ValueError, match=rf"has '{key}', .* did you mean '{meant}'\? Tasks look for sst2_train, "
    ):
        manager.load([name])


@pytest.mark.slow
def test_many_examples_are_read_once(folder, tasks, monkeypatch):
    read, reading = [], MemoryDecoder.read

    def watched(decoder, tokens, *arguments, **options):
        read.append(tokens.shape[1])
        return reading(decoder, tokens, *arguments, **options)

    monkeypatch.setattr(MemoryDecoder, "read", watched)
    found = simple_evaluate(
        model="memlong",
        model_args=f"pretrained={folder},dtype=float32,chunk_size=4,top_k=3,local_window=24,segment_size=8,device=cpu",
        tasks=list(WORDS),
        task_manager=tasks,
        num_fewshot=40,
        limit=10,
        log_samples=True,
        bootstrap_iters=0,
    )
    assert all(0 <= found["results"][name]["acc,none"] <= 1 for name in WORDS)
    prompts = [found["samples"][name][0]["arguments"][0][0] for name in WORDS]
    lengths = sorted(len(prompt.split()) for prompt in prompts)
    assert len(read) == len(WORDS)
    assert all(length - 16 < count < length for count, length in zip(sorted(read), lengths, strict=True))
