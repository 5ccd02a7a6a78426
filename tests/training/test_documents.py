"""Texts from files, folders and datasets, and the order in which their episodes come."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from memlong.errors import InvalidArgumentError, InvalidTextError, MissingDependencyError
from memlong.training import read_dataset, read_documents
from memlong.training.documents import Episodes


def test_files_and_folders_are_read_in_order(tmp_path):
    for name, words in {"b.md": "two", "a.txt": "one", "sub/c.py": "three", "d.json": "no"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(words)
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "old.txt").write_bytes(b"caf\xe9")
    (tmp_path / "alone.rst").write_text("zero")
    with pytest.warns(UserWarning, match=r"Skipped 2 files in .*\. The first: .*empty.py' is empty"):
        found = list(read_documents([tmp_path / "alone.rst", tmp_path]))
    assert found == ["zero", "one", "two", "three"]


def test_a_folder_is_one_document_where_it_is_to_be(tmp_path):
    for name, words in {
        "b.py": "from sub.c import f\n\n\n",
        "sub/c.py": "def f(): ...\n",
        "a.md": "one",
    }.items():
        (tmp_path / "code" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "code" / name).write_text(words)
    (tmp_path / "alone.txt").write_text("zero")
    found = list(read_documents([tmp_path / "code", tmp_path / "alone.txt"], join=True))
    assert found == ["a.md\none\n\nb.py\nfrom sub.c import f\n\nsub/c.py\ndef f(): ...\n", "zero"]


def test_what_holds_no_text_is_said(tmp_path):
    with pytest.raises(InvalidTextError, match="does not exist"):
        list(read_documents([tmp_path / "none.txt"]))
    with pytest.raises(InvalidTextError, match=r"has no text in files named \*.txt, \*.md, \*.py"):
        list(read_documents([tmp_path]))


def test_a_dataset_needs_its_library(monkeypatch):
    monkeypatch.setattr("memlong.training.documents.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="pip install datasets"):
        list(read_dataset("some/data"))


class Table(list):
    column_names = ("text", "label")


@pytest.fixture
def fake_datasets(monkeypatch):
    def load_dataset(name, split):
        if name != "some/data":
            raise FileNotFoundError(f"no dataset {name}")
        return Table({"text": f"{split} {number}", "label": None} for number in range(3))

    module = ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setattr("memlong.training.documents.find_spec", lambda name: object())


def test_a_dataset_is_read_by_its_column(fake_datasets):
    assert list(read_dataset("some/data", split="test")) == ["test 0", "test 1", "test 2"]
    with pytest.raises(
        InvalidArgumentError, match=r"The column 'label' .* must be text, got NoneType in row 0"
    ):
        list(read_dataset("some/data", column="label"))
    with pytest.raises(InvalidArgumentError, match=r"column must be one of 'text', 'label' .* got 'content'"):
        list(read_dataset("some/data", column="content"))
    with pytest.raises(InvalidArgumentError, match="Cannot load the dataset 'other': no dataset other"):
        list(read_dataset("other"))


def episodes(seed=0):
    return Episodes([torch.arange(25), torch.arange(100, 110), torch.arange(3)], 10, 4, seed)


def test_documents_are_cut_and_short_ends_left_out():
    found = episodes()
    assert len(found) == 4
    assert found.tokens == 35
    pieces = sorted((found[number].tokens.tolist() for number in range(4)), key=lambda piece: piece[0])
    assert pieces == [
        list(range(10)),
        list(range(10, 20)),
        list(range(20, 25)),
        list(range(100, 110)),
    ]


def test_the_order_is_the_seeds_and_another_one_each_epoch():
    def order(seed, epoch):
        found = episodes(seed)
        return [int(found[4 * epoch + number].tokens[0]) for number in range(4)]

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) > 4
    assert sorted(order(0, 5)) == sorted(order(1, 2))


def test_a_batch_has_no_episode_twice():
    texts = [torch.arange(10) + 10 * number for number in range(5)]
    found = Episodes(texts, 10, 4, 0, together=3)
    batches = [[int(found[3 * batch + row].tokens[0]) for row in range(3)] for batch in range(60)]
    assert all(len(set(batch)) == 3 for batch in batches)
    assert {each for batch in batches for each in batch} == {0, 10, 20, 30, 40}
    few = Episodes(texts[:2], 10, 4, 0, together=3)
    assert {int(few[number].tokens[0]) for number in range(3)} == {0, 10}


def test_a_digest_tells_texts_and_cuts_apart():
    one = Episodes([torch.arange(20)], 10, 4, 0).digest
    assert one == Episodes([torch.arange(20)], 10, 4, 1).digest
    assert one != Episodes([torch.arange(20)], 20, 4, 0).digest
    assert one != Episodes([torch.arange(1, 21)], 10, 4, 0).digest
    assert one != Episodes([torch.arange(20), torch.arange(2)], 10, 4, 0).digest  # too short: filler


@pytest.mark.parametrize("odd", [torch.zeros(1, 20, dtype=torch.int64), torch.zeros(20), [1, 2, 3]])
def test_what_is_no_document_is_refused(odd):
    with pytest.raises(InvalidArgumentError, match=r"documents must be a list of integer tensors .*, got "):
        Episodes([odd], 10, 4, 0)
