"""What is wrong with an argument is said before anything is loaded or written, and by its right name."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from memlong import MemoryConfig, MemoryDecoder, create_bank
from memlong.bank.store.objects import RemoteObjects
from memlong.errors import InvalidArgumentError, MemlongError
from memlong.testing.harness import DIM, random_chunks
from memlong.testing.models import tiny_model


@pytest.mark.parametrize(
    ("store", "message"),
    [
        ({"hots": "1GB"}, "hots"),
        ({"disk_budget": "1GB"}, "disk_budget needs a folder"),
        ({"objects": "s3:/bucket"}, "must have two slashes"),
        ({"disk": "s3://bucket/kv"}, "must be a local path"),
        ({"host": "much"}, "host"),
        ({"host": "1GB", "readers": 0}, "readers must be an integer"),
    ],
)
def test_settings_refuse_a_store_that_cannot_be(store, message):
    with pytest.raises(InvalidArgumentError, match=message):
        MemoryConfig(store=store)


def test_settings_check_a_store_without_its_library_or_a_folder(tmp_path):
    program = (
        "import sys; from memlong import MemoryConfig\n"
        f"MemoryConfig(store={{'objects': {str(tmp_path / 'kv')!r}}}); MemoryConfig(store={{'objects': 's3://b/kv'}})\n"
        "assert 'fsspec' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=100)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MemoryConfig(neighbours=2), "no setting 'neighbours'"),
        (lambda: MemoryConfig(topk=2), "no setting 'topk'.*[Dd]id you mean 'top_k'"),
        (lambda: create_bank("hnswlib", DIM, ef_constructon=9), "[Dd]id you mean 'ef_construction'"),
    ],
)
def test_a_misspelled_name_is_said_with_the_nearest(call, message):
    with pytest.raises(MemlongError, match=message):
        call()


def test_a_file_in_the_place_of_a_folder_is_said(tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("mine", encoding="utf-8")
    bank = create_bank("torch", DIM)
    random_chunks(2).into(bank)
    with pytest.raises(MemlongError, match="is a file: name a folder"):
        bank.save(file)
    assert file.read_text(encoding="utf-8") == "mine"


def test_generate_names_its_own_option_and_a_warning_the_line_of_the_caller():
    model, prompt = tiny_model(), torch.tensor([[1, 2, 3]])
    with MemoryDecoder(
        model, None, MemoryConfig(retriever="random", local_window=128, segment_size=32, chunk_size=16)
    ) as decoder:
        with pytest.raises(ValueError, match="max_new_tokens"):
            decoder.generate(prompt, max_tokens=3)
        with pytest.warns(UserWarning, match="does not use the attached memory") as told:
            model.generate(prompt, max_new_tokens=1, do_sample=False)
    assert told[0].filename == __file__


def test_folders_are_made_where_a_filesystem_has_them(tmp_path):
    pytest.importorskip("fsspec")
    objects = RemoteObjects(f"file://{tmp_path}/deep/folder")
    objects.write("a/b", b"1")
    assert objects.read("a/b", 9) == b"1"
    assert [each.name for each in objects.list()] == ["a/b"]
