"""bench/lm_eval_equality.py, which compares memlong with transformers' own model, and the task of one's own texts."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from memlong.errors import InvalidArgumentError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def equality(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module("lm_eval_equality")


@pytest.fixture
def metadata(tmp_path):
    """What the tasks of examples/lm_eval read: labeled reviews, and a folder of two texts."""
    rows = [f"w{number} film\t{number % 2}" for number in range(60)]
    (tmp_path / "sst2.tsv").write_text("\n".join(rows), encoding="utf-8")
    (tmp_path / "texts").mkdir()
    for name in "ba":
        words = " ".join(f"w{number}" for number in range(40))
        (tmp_path / "texts" / f"{name}.txt").write_text(f"{words} {name}", encoding="utf-8")
    return {"sst2_train": str(tmp_path / "sst2.tsv"), "text": str(tmp_path / "texts"), "characters": 100}


def run(equality, folder, metadata, path, **options):
    equality.main(
        **{
            "tasks": "text_local,sst2_local",
            "model": str(folder),
            "metadata": json.dumps(metadata),
            "include_path": equality.EXAMPLES,
            "length": 1024,
            "local_window": 500,
            "num_fewshot": 2,
            "limit": 2,
            "json_file": path,
            **options,
        }
    )
    return json.loads(path.read_text(encoding="utf-8"))["rows"]


def test_answers_are_those_of_transformers_own_model(equality, folder, metadata, tmp_path, capsys):
    text, reviews = run(equality, folder, metadata, tmp_path / "found.json")
    assert (text["task"], text["metric"], text["requests"], text["same"]) == (
        "text_local",
        "word_perplexity",
        2,
        None,
    )
    assert text["score"] == pytest.approx(text["theirs"])
    assert (reviews["requests"], reviews["same"]) == (4, 4)
    assert text["difference"] < 1e-3
    assert reviews["difference"] < 1e-3
    assert "| sst2_local | acc |" in capsys.readouterr().out


def test_unknown_tasks_and_other_metadata_are_named(equality, folder, metadata, tmp_path):
    with pytest.raises(InvalidArgumentError, match=r"There is no task 'sst3' among .*sst2_local"):
        run(equality, folder, metadata, tmp_path / "found.json", tasks="sst3")
    for given in ("{", "[]"):
        with pytest.raises(InvalidArgumentError, match="--metadata must be "):
            equality._mapping(given)


def test_texts_that_are_not_there_are_explained(metadata, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "lm_eval"))
    texts = importlib.import_module("texts").texts
    assert [len(row["text"]) for row in texts(**metadata)["test"]] == [100, 100]
    with pytest.raises(ValueError, match="text is missing: name your file"):
        texts()
    with pytest.raises(ValueError, match=r"must be a text file, or a folder with .txt files in it"):
        texts(text=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="did you mean 'characters'"):
        texts(text=metadata["text"], charcters=100)
    with pytest.raises(InvalidArgumentError, match="characters must be an integer of at least 1, got '5'"):
        texts(text=metadata["text"], characters="5")
