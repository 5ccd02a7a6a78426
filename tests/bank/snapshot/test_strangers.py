"""A snapshot may be a stranger's: what it may choose of a bank are options that do no harm, within bounds."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from memlong import SnapshotError, load_bank
from memlong.bank import bank_of
from memlong.bank.snapshot.files import FileRecord
from memlong.bank.snapshot.manifest import _dumped
from memlong.bank.snapshot.options import options_to_save, refused_option
from memlong.bank.snapshot.tending import verify
from memlong.bank.snapshot.tensors import read_streams
from memlong_torch.index import TorchIndex

TorchBank = bank_of(TorchIndex)


def forge(folder, **changes):
    """Change what the manifest says of the bank, its hash included."""
    path = folder / "manifest.json"
    data = json.loads(path.read_bytes())
    del data["sha256"]
    data["banks"][0].update(changes)
    path.write_bytes(_dumped(data))


def as_the_hub_has_it(folder, cache):
    """Lay a folder out as ``huggingface_hub.snapshot_download`` does: links to blobs of the same repository."""
    blobs, revision = cache / "models--a--b" / "blobs", cache / "models--a--b" / "snapshots" / "revision"
    blobs.mkdir(parents=True)
    revision.mkdir(parents=True)
    for number, file in enumerate(folder.iterdir()):
        file.rename(blobs / str(number))
        (revision / file.name).symlink_to(Path("..", "..", "blobs", str(number)))
    return revision


@pytest.mark.parametrize("lazy", [False, True])
def test_links_of_the_hubs_cache_are_followed(make, tmp_path, lazy):
    bank = make()
    bank.save(tmp_path / "saved")
    folder = as_the_hub_has_it(tmp_path / "saved", tmp_path / "cache")
    loaded = load_bank(folder, lazy=lazy)
    assert loaded.ids.tolist() == bank.ids.tolist()
    assert torch.equal(loaded.fetch(loaded.ids).keys, bank.fetch(bank.ids).keys)
    verify(folder)


@pytest.mark.parametrize(
    "target", ["../../../elsewhere", "../../blobs", "../../blobs/0/../../../../elsewhere", "loop"]
)
def test_other_links_are_not(make, tmp_path, target):
    make().save(tmp_path / "saved")
    folder = as_the_hub_has_it(tmp_path / "saved", tmp_path / "cache")
    (tmp_path / "cache" / "elsewhere").write_bytes((folder / "manifest.json").read_bytes())
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").symlink_to("manifest.json" if target == "loop" else target)
    with pytest.raises(SnapshotError, match=r"is a link|cannot be read"):
        load_bank(folder)


def test_a_link_out_of_a_plain_folder_is_no_damage(make, tmp_path):
    make().save(tmp_path / "saved")
    (tmp_path / "saved" / "manifest.json").rename(tmp_path / "elsewhere")
    (tmp_path / "saved" / "manifest.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(
        SnapshotError, match=r"is a link, which could lead anywhere: only those of the hub's.*cp -L"
    ):
        load_bank(tmp_path / "saved")


def test_a_file_that_is_all_hole_is_not_read(make, tmp_path):
    make().save(tmp_path)
    (blocks,) = tmp_path.glob("blocks-*")
    os.truncate(blocks, 40 << 30)
    with pytest.raises(SnapshotError, match=r"claims far more bytes than there are on the disk.*most_bytes"):
        load_bank(tmp_path)
    with pytest.raises(SnapshotError, match="bytes instead of"):
        load_bank(tmp_path, most_bytes="1TB")


class Remote(TorchBank):
    """A backend of a plugin, which goes where it is told to."""

    asked = ()
    saved_options: ClassVar = {"effort": 100}

    def __init__(self, dim, *, uri=None, effort=3, **options):
        Remote.asked = (*Remote.asked, uri)
        super().__init__(dim, **options)


@pytest.fixture
def of_remote(make, tmp_path, monkeypatch):
    monkeypatch.setattr(Remote, "asked", ())
    make().save(tmp_path)

    def forged(**options):
        made_by = f"{Remote.__module__}:{Remote.__qualname__}"
        forge(tmp_path, made_by=made_by, options=options)
        return tmp_path

    return forged


@pytest.mark.parametrize(
    "options", [{"uri": "http://stranger"}, {"effort": 3, "folder": "s3://x"}, {"uri": ["x"]}]
)
def test_a_snapshot_chooses_no_place(of_remote, options):
    folder = of_remote(**options)
    with pytest.raises(
        SnapshotError, match=r"manifest\.json.* names the option '(uri|folder)'.*yourself when loading"
    ):
        Remote.load(folder)
    assert Remote.asked == ()  # it was not even made


def test_the_user_does(of_remote):
    folder = of_remote(uri="http://stranger", effort=7)
    assert len(Remote.load(folder, uri="http://mine")) == 38
    assert Remote.asked == ("http://mine",)


@pytest.mark.parametrize("effort", [101, 1e308, float("inf"), [3], {"a": 3}])
def test_a_snapshot_asks_for_no_more_than_its_author_allows(of_remote, effort):
    assert "effort" in refused_option(Remote, {"effort": effort}, Remote.saved_options)
    assert "effort" in refused_option(Remote, {"effort": float("nan")}, Remote.saved_options)


@pytest.mark.parametrize(
    ("backend", "option", "value"),
    [
        ("hnswlib", "ef_construction", 2**20),
        ("hnswlib", "build_threads", 1024),
        ("hnswlib", "initial_capacity", 2**20),
        ("hnswlib", "M", 512),
        ("faiss", "build_threads", 1024),
        ("faiss", "ef_construction", 2**20),
    ],
)
def test_efforts_without_bound_are_the_users_to_ask_for(make, tmp_path, backend, option, value):
    bank = make(backend)
    bank.save(tmp_path)
    forge(tmp_path, options={**bank.options_to_save(), option: value})
    with pytest.raises(
        SnapshotError, match=rf"{option}', {value}, more than a file may ask for .*give {option} yourself"
    ):
        load_bank(tmp_path)
    assert len(load_bank(tmp_path, **{option: 16})) == 38


def test_text_that_may_be_secret_is_not_saved():
    options = {"effort": 3, "address": "http://me:secret@host", "beam": 4}
    assert options_to_save(options, Remote.saved_options) == {"effort": 3, "address": "***", "beam": 4}


def signed(folder, data):
    """Write a manifest as a stranger would: any JSON, and its hash."""
    text = json.dumps(data, indent=1)
    digest = hashlib.sha256(text.encode()).hexdigest()
    (folder / "manifest.json").write_text(f'{text[:-2]},\n "sha256": "{digest}"\n}}\n')


def test_a_deep_and_wide_manifest_is_refused_soon(make, tmp_path):
    make().save(tmp_path)
    wide = b"[" * 900 + b"[]," * 300_000 + b"[]" + b"]" * 900  # which takes gigabytes when it is indented
    (tmp_path / "manifest.json").write_bytes(
        b'{"format": "memlong-snapshot", "version": 3, "x": ' + wide + b"}"
    )
    began = time.process_time()
    with pytest.raises(SnapshotError, match="is not what its SHA-256 says"):
        load_bank(tmp_path)
    assert time.process_time() - began < 4


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_no_number_is_not_taken_from_a_manifest(make, tmp_path, number):
    make().save(tmp_path)
    data = json.loads((tmp_path / "manifest.json").read_bytes())
    del data["sha256"]
    data["banks"][0]["options"]["x"] = number
    signed(tmp_path, data)
    with pytest.raises(SnapshotError, match="is not a number"):
        load_bank(tmp_path)


@pytest.mark.parametrize("kind", ["holes", "names of one file"])
def test_files_that_are_hollow_together_are_not_read(make, tmp_path, kind):
    make().save(tmp_path)
    data = json.loads((tmp_path / "manifest.json").read_bytes())
    del data["sha256"]
    size = 20_000_000
    for number in range(100, 120):
        path = tmp_path / f"index-{number}-1.bin"
        if kind == "holes":
            path.touch()
            os.truncate(path, size)
        elif number == 100:
            path.write_bytes(bytes(size))
        else:
            path.hardlink_to(tmp_path / "index-100-1.bin")
        file = {"name": path.name, "nbytes": size, "sha256": "0" * 64}
        data["banks"][0]["segments"].append(
            {"count": 1, "chunks": file, "blocks": dict(file, name=f"blocks-{number}-1.safetensors")}
        )
    signed(tmp_path, data)
    with pytest.raises(SnapshotError, match="claims far more bytes than there are on the disk"):
        load_bank(tmp_path)


def test_a_file_of_endless_tensors_is_not_parsed(tmp_path):
    path, text = tmp_path / "streams-1-1.safetensors", b"{" + b" " * (9 << 20) + b"}"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    content = path.read_bytes()
    record = FileRecord(path.name, len(content), hashlib.sha256(content).hexdigest())
    with pytest.raises(SnapshotError, match="says more of its tensors than such a file ever does"):
        read_streams(tmp_path, record)


def test_a_message_is_text_and_no_longer_than_can_be_read(make, tmp_path):
    make().save(tmp_path)
    data = json.loads((tmp_path / "manifest.json").read_bytes())
    del data["sha256"]
    data["\x1b[31m" + "x" * 100_000] = 1
    signed(tmp_path, data)
    with pytest.raises(SnapshotError) as caught:
        load_bank(tmp_path)
    assert "\x1b" not in str(caught.value)
    assert r"\x1b[31mxxx" in str(caught.value)
    assert len(str(caught.value)) < 10_000
