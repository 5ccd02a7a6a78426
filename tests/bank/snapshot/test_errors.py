"""What goes wrong is said, naming the file, and what was saved before is still there."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tempfile
import threading
from io import FileIO

import pytest
import torch

from memlong import SnapshotError, create_bank, load_bank
from memlong.bank import InMemoryStore, TieredStore, bank_of
from memlong.bank.snapshot import files, manifest, writer
from memlong.bank.snapshot.locking import FolderLock
from memlong.bank.snapshot.manifest import _dumped
from memlong.bank.snapshot.segments import check_finite
from memlong.bank.snapshot.writer import check_place
from memlong.errors import DeviceUnavailableError, InvalidArgumentError, StorageError
from memlong.testing.harness import DIM, assert_same_state, random_chunks, state_of
from memlong_torch.index import TorchIndex


@pytest.fixture
def saved(make, tmp_path):
    bank = make()
    bank.save(tmp_path / "bank")
    return bank, tmp_path / "bank"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def forge(folder, change):
    """Write the manifest anew, its hash included."""
    path = folder / "manifest.json"
    data = json.loads(path.read_bytes())
    del data["sha256"]
    change(data)
    path.write_bytes(_dumped(data))


class Failing(FileIO):
    """Files of a disk that is full after some calls."""

    left = 0
    at = "write"

    def write(self, content):
        return self._tripped("write") or super().write(content)

    def fileno(self):
        self._tripped("fsync")
        return super().fileno()

    def _tripped(self, at):
        if at == Failing.at and self.writable():
            Failing.left -= 1
            if Failing.left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("at", ["write", "fsync"])
@pytest.mark.parametrize("calls", range(12))
def test_a_full_disk_leaves_the_earlier_snapshot(saved, monkeypatch, at, calls):
    bank, folder = saved
    before, there = state_of(bank), names(folder)
    random_chunks(3, seed=1, first=40).into(bank)
    Failing.left, Failing.at = calls, at
    with monkeypatch.context() as patch:
        patch.setattr(files, "FileIO", Failing)
        try:
            bank.save(folder)
        except SnapshotError as error:
            assert "No space left on device. What was saved there before is as it was" in str(error)  # noqa: PT017
            assert str(folder) in str(error)  # noqa: PT017
        else:
            assert calls >= 4
            return
    assert names(folder) == there
    assert_same_state(before, load_bank(folder))
    bank.save(folder)
    assert_same_state(state_of(bank), load_bank(folder))


@pytest.mark.parametrize("call", ["replace", "sync_folder", "mkdir"])
def test_a_disk_that_fails_otherwise_leaves_the_earlier_snapshot(saved, monkeypatch, call):
    bank, folder = saved
    before = state_of(bank)
    random_chunks(3, seed=1, first=40).into(bank)

    def fail(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        patch.setattr(*((os, "fsync") if call == "sync_folder" else (writer.Path, call)), fail)
        with pytest.raises(SnapshotError, match="Read-only file system"):
            bank.save(folder)
    assert_same_state(before, load_bank(folder))


@pytest.mark.parametrize("error", [OSError(errno.EIO, os.strerror(errno.EIO)), KeyboardInterrupt()])
def test_nothing_is_removed_before_the_new_manifest_is_confirmed(saved, monkeypatch, error):
    bank, folder = saved
    before = names(folder)
    bank.evict(30)

    replace = writer.Path.replace

    def replaced_and_cut_off(self, target):
        replace(self, target)
        monkeypatch.setattr(os, "fsync", lambda number: (_ for _ in ()).throw(error))

    monkeypatch.setattr(writer.Path, "replace", replaced_and_cut_off)
    with pytest.raises(SnapshotError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
        bank.save(folder)
    assert set(before) < set(names(folder))
    assert isinstance(error, KeyboardInterrupt) or "the disk has not confirmed that" in str(caught.value)
    assert_same_state(state_of(bank), load_bank(folder))
    monkeypatch.undo()
    bank.save(folder)
    assert len(names(folder)) == len(before)


def test_all_folders_that_are_new_are_confirmed(make, tmp_path, monkeypatch):
    synced = []
    sync = writer.sync_folder
    monkeypatch.setattr(writer, "sync_folder", lambda folder: (synced.append(folder), sync(folder)))
    make().save(tmp_path / "a" / "b" / "c")
    assert {tmp_path, tmp_path / "a", tmp_path / "a" / "b", tmp_path / "a" / "b" / "c"} <= set(synced)


@pytest.mark.parametrize("limit", ["max_chunks", "max_bytes"])
def test_a_limit_as_large_as_any_is_saved(make, tmp_path, limit):
    make(**{limit: sys.maxsize}).save(tmp_path)
    assert len(load_bank(tmp_path)) == 38


def test_what_could_not_be_loaded_is_not_saved(saved):
    bank, folder = saved
    before, there = state_of(bank), names(folder)
    other = create_bank("torch", DIM)
    other.state.capacity.max_bytes = 2**70  # which no bank is made with
    with pytest.raises(InvalidArgumentError, match="this cannot be saved, as it could not be loaded"):
        other.save(folder)
    assert names(folder) == there
    assert_same_state(before, load_bank(folder))


def test_a_manifest_that_takes_too_much_is_not_saved(make, tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "_MOST_BYTES", 10)
    with pytest.raises(InvalidArgumentError, match="more than a manifest ever has"):
        make().save(tmp_path)
    assert names(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write and read anything")
@pytest.mark.parametrize("rights", [0o500, 0o000])
def test_rights_that_are_missing_are_named(saved, rights):
    bank, folder = saved
    folder.chmod(rights)
    try:
        with pytest.raises(SnapshotError, match="Permission denied"):
            bank.save(folder) if rights else load_bank(folder)
    finally:
        folder.chmod(0o700)


def test_a_file_that_cannot_be_read_is_named(saved, monkeypatch):
    _, folder = saved

    def fail(self, buffer):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(files, "FileIO", type("Bad", (FileIO,), {"readinto": fail}))
    with pytest.raises(SnapshotError, match=r"manifest\.json' cannot be read: Input/output error"):
        load_bank(folder)


def test_a_folder_of_other_things_is_left_alone(make, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(SnapshotError, match=r"letter\.txt' is not part of a snapshot"):
        make().save(tmp_path)
    assert names(tmp_path) == ["letter.txt"]


def test_a_place_is_checked_before_anything_is_written(saved, tmp_path):
    _, folder = saved
    check_place(folder, "bank")
    with pytest.raises(SnapshotError, match="holds the snapshot of a bank, and this is one of a decoder"):
        check_place(folder, "decoder")
    new = tmp_path / "new" / "deep"
    check_place(new, "bank")
    assert not new.parent.exists()
    new.parent.write_text("mine")
    with pytest.raises(SnapshotError, match="is a file: name a folder"):
        check_place(new, "bank")
    with pytest.raises(SnapshotError, match="File name too long"):
        check_place(tmp_path / ("long" * 100), "bank")


def test_a_place_where_nothing_can_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(SnapshotError, match="cannot be written: Permission denied"):
        check_place(tmp_path / "new", "bank")


@pytest.mark.parametrize("name", ["epoch-3-100.safetensors", "data-1-2.bin", "index-1-2.bin"])
def test_files_that_only_look_like_a_snapshots_are_left_alone(make, tmp_path, name):
    (tmp_path / name).write_bytes(b"mine")
    with pytest.raises(SnapshotError, match=f"{name}' is not part of a snapshot"):
        make().save(tmp_path)
    assert names(tmp_path) == [name]


def test_files_beside_a_snapshot_that_look_like_its_own_stay(saved):
    bank, folder = saved
    (folder / "epoch-3-100.safetensors").write_bytes(b"mine")
    bank.save(folder)
    assert "epoch-3-100.safetensors" in names(folder)


def test_other_things_in_a_snapshot_are_left_alone(saved):
    bank, folder = saved
    (folder / "notes.txt").write_text("mine")
    bank.save(folder)
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_file_where_the_folder_should_be(make, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SnapshotError, match="file"):
        make().save(tmp_path / "file")
    with pytest.raises(SnapshotError, match="file"):
        load_bank(tmp_path / "file")


@pytest.mark.parametrize("there", ["nothing", "empty"])
def test_no_snapshot_is_said(tmp_path, there):
    folder = tmp_path / "x"
    if there == "empty":
        folder.mkdir()
    with pytest.raises(SnapshotError, match=r"holds no manifest\.json, so no snapshot"):
        load_bank(folder)


def test_what_a_first_save_left_behind_is_cleared(make, tmp_path):
    (tmp_path / "blocks-1-1.safetensors").write_bytes(b"half")
    (tmp_path / "manifest.json.new").write_bytes(b"half")
    (tmp_path / "lock").write_text("999999999\n")
    make().save(tmp_path)
    assert names(tmp_path) == [
        "blocks-1-1.safetensors",
        "chunks-1-2.safetensors",
        "manifest.json",
        "state-1-3.safetensors",
    ]
    assert len(load_bank(tmp_path)) == 38


@pytest.mark.parametrize(
    ("version", "advice"),
    [(4, "Use a newer memlong$"), (2, "Use the memlong that wrote it"), ("9", "Use the")],
)
def test_another_version_is_refused_by_name(saved, version, advice):
    _, folder = saved
    forge(folder, lambda data: data.update(version=version))
    with pytest.raises(
        SnapshotError, match=rf"has the format version {version!r}, but .* version 3\. {advice}"
    ):
        load_bank(folder)


def test_nan_is_refused(saved):
    bank, folder = saved
    keys = random_chunks(1).keys
    store = bank.state.store
    store._blocks[5] = (torch.full_like(keys[0], float("nan")), keys[0])
    bank.save(folder, compact=True)
    with pytest.raises(SnapshotError, match=r"blocks-.*holds keys or values that are not finite"):
        load_bank(folder)
    lazy = load_bank(folder, lazy=True)
    assert (lazy.fetch([6]).keys == 6).all()
    with pytest.raises(SnapshotError, match=r"blocks-.*holds keys or values that are not finite"):
        lazy.fetch([5])


def test_options_that_the_backend_does_not_take(saved):
    _, folder = saved
    forge(folder, lambda data: data["banks"][0]["options"].update(depth=3))
    with pytest.raises(
        SnapshotError, match=r"manifest\.json.*names the option 'depth', which TorchBank takes from no file"
    ):
        load_bank(folder)
    assert len(load_bank(folder, "faiss")) == 38


def test_a_capacity_that_cannot_hold_a_chunk(saved):
    _, folder = saved
    with pytest.raises(InvalidArgumentError, match="max_bytes is 100, but one chunk takes"):
        load_bank(folder, max_bytes=100)
    forge(folder, lambda data: data["banks"][0].update(max_bytes=100))
    with pytest.raises(SnapshotError, match=r"manifest\.json.*max_bytes is 100, but one chunk takes"):
        load_bank(folder)


def test_a_device_that_is_not_here(saved):
    _, folder = saved
    forge(folder, lambda data: data["banks"][0]["layout"].update(device="cuda:99"))
    with pytest.raises(DeviceUnavailableError, match="kv_device='cpu'"):
        load_bank(folder)
    assert len(load_bank(folder, kv_device="cpu")) == 38


@pytest.mark.parametrize("device", ["meta", "mps", "xla", "xpu:1"])
def test_a_device_that_no_snapshot_may_choose(saved, device):
    _, folder = saved
    forge(folder, lambda data: data["banks"][0]["layout"].update(device=device))
    for lazy in (False, True):
        with pytest.raises(DeviceUnavailableError, match="kv_device='cpu'"):
            load_bank(folder, lazy=lazy)
    assert len(load_bank(folder, kv_device="cpu")) == 38
    with pytest.raises(DeviceUnavailableError, match="kv_device='cpu'"):
        load_bank(folder, kv_device="meta")


def test_the_cpu_is_the_cpu_whatever_its_number(saved):
    _, folder = saved
    forge(folder, lambda data: data["banks"][0]["layout"].update(device="cpu:5"))
    loaded = load_bank(folder)
    assert str(loaded.layout.device) == "cpu"
    assert random_chunks(1, first=40).into(loaded).tolist() == [40]


@pytest.mark.parametrize("shape", [[1, 1, 2**14, 2**14], [2**20] * 4, [0, 1, 1, 1]])
def test_an_empty_bank_of_chunks_that_cannot_be(make, tmp_path, shape):
    bank = make()
    bank.remove(bank.ids)
    bank.save(tmp_path)
    forge(tmp_path, lambda data: data["banks"][0]["layout"].update(shape=shape))
    with pytest.raises(SnapshotError, match=r"manifest\.json.*layout\.shape"):
        load_bank(tmp_path, store=TieredStore(host="1MB"))


def test_an_index_that_is_not_wanted_is_never_held(make, tmp_path, monkeypatch):
    make("hnswlib", chunks=100).save(tmp_path)
    (path,) = tmp_path.glob("index-*")
    read, most = files.CheckedFile.read, []

    def noted(self, count):
        if self._path == path:
            most.append(count)
        return read(self, count)

    monkeypatch.setattr(files.CheckedFile, "read", noted)
    monkeypatch.setattr(files, "_PIECE", 1000)
    load_bank(tmp_path)
    assert (max(most), sum(most)) == (1000, path.stat().st_size)


@pytest.mark.parametrize("options", [{"bogus": 1}, {"store": 3}, {"max_chunks": "many"}])
def test_an_option_that_the_caller_gave_is_not_blamed_on_the_snapshot(saved, options):
    with pytest.raises(InvalidArgumentError, match=f"{next(iter(options))}"):
        bank_of(TorchIndex).load(saved[1], **options)


def test_options_of_the_snapshot_are_blamed_on_it_whatever_the_caller_gave(saved):
    _, folder = saved
    forge(folder, lambda data: data["banks"][0]["options"].update(depth=3))
    with pytest.raises(
        SnapshotError, match=r"manifest\.json.*names the option 'depth', which TorchBank takes from no file"
    ):
        load_bank(folder, max_chunks=50)


def test_runs_of_rows_that_cannot_be(make, tmp_path):
    make("faiss-hnsw").save(tmp_path)
    for runs in ([[0, 2**45]], [[0, 30], [10, 40]], [[0.0, 40.0]], [["a", "b"]], [[40, 0]], 7):
        forge(tmp_path, lambda data, runs=runs: data["banks"][0]["index"]["facts"].update(row_ids=runs))
        with pytest.raises(SnapshotError, match="is not read by this backend's library"):
            load_bank(tmp_path, trust_index=True)


def test_no_folder_for_the_file_of_a_trusted_index(make, tmp_path, monkeypatch):
    make("hnswlib").save(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(SnapshotError, match="is not read by this backend's library"):
        load_bank(tmp_path, trust_index=True)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.uint16])
def test_streams_of_odd_dtypes_do_not_stop_a_check(tmp_path, dtype):
    if dtype.is_complex:
        with pytest.raises(SnapshotError, match="complex"):
            check_finite(tmp_path, torch.zeros(3, dtype=dtype))
    else:
        check_finite(tmp_path, torch.zeros(3, dtype=dtype))


def test_a_manifest_is_as_long_as_the_file_that_was_opened(saved, monkeypatch):
    bank, folder = saved
    opened = manifest.open_plain

    def open_and_save(path):
        file = opened(path)
        monkeypatch.undo()
        random_chunks(300, seed=1, first=40).into(bank)
        bank.save(folder)
        return file

    monkeypatch.setattr(manifest, "open_plain", open_and_save)
    assert manifest.read_manifest(folder).generation == 1


def test_an_option_that_json_cannot_hold(tmp_path, monkeypatch):
    bank = create_bank("torch", DIM)
    monkeypatch.setattr(bank.index, "options_to_save", lambda: {"size": object()})
    with pytest.raises(InvalidArgumentError, match="the option size"):
        bank.save(tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize("backend", ["hnswlib", "faiss-hnsw"])
def test_no_byte_of_a_changed_index_reaches_its_library(make, tmp_path, monkeypatch, backend):
    bank = make(backend)
    bank.save(tmp_path)
    (path,) = tmp_path.glob("index-*")
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    monkeypatch.setattr(type(bank.index), "load", None)
    with pytest.raises(SnapshotError, match=path.name):
        load_bank(tmp_path, trust_index=True)


def test_an_index_of_another_library_version_is_refused_by_name(make, tmp_path):
    make("hnswlib").save(tmp_path)
    forge(tmp_path, lambda data: data["banks"][0]["index"]["facts"].update(library="0.0"))
    with pytest.raises(SnapshotError, match=r"saved by hnswlib 0\.0"):
        load_bank(tmp_path, trust_index=True)
    assert len(load_bank(tmp_path)) == 38


def test_a_state_that_is_written_meanwhile_is_read_instead(saved, monkeypatch):
    bank, folder = saved
    store = InMemoryStore()
    read, turns = files.CheckedFile.finish, iter([True])

    def finish(self):
        if next(turns, False):
            bank.evict(30)
            bank.save(folder)  # the file that is read next has gone
        read(self)

    monkeypatch.setattr(files.CheckedFile, "finish", finish)
    assert len(load_bank(folder, store=store)) == len(store) == 8


def test_a_load_that_fails_leaves_its_store_empty(make, tmp_path):
    make(chunks=300).save(tmp_path)
    (path,) = tmp_path.glob("blocks-*")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    store = InMemoryStore()
    with pytest.raises(SnapshotError, match=path.name):
        load_bank(tmp_path, store=store)
    assert len(store) == 0


HOLD = """
import sys
from pathlib import Path
from memlong.bank.snapshot.locking import FolderLock
with FolderLock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
def test_two_processes_do_not_write_one_folder(saved):
    bank, folder = saved
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(SnapshotError, match=f"lock' is held by process {process.pid}"):
            bank.save(folder)
        assert len(load_bank(folder)) == 38
        process.kill()
    assert "lock" in names(folder)  # the lock of a process that died
    bank.save(folder)
    assert "lock" not in names(folder)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_does_not_hold_the_lock(tmp_path):
    (at_start, started), (at_end, ended) = os.pipe(), os.pipe()
    lock = FolderLock(tmp_path).__enter__()
    child = os.fork()
    if not child:
        os.close(ended)
        os.write(started, b"x")
        os.read(at_end, 1)
        os._exit(0)
    try:
        os.read(at_start, 1)
        with pytest.raises(SnapshotError, match="is held by process"):
            FolderLock(tmp_path).__enter__()
        lock.after_fork()  # closed, as when the process dies, but its child does not
        with FolderLock(tmp_path):
            assert names(tmp_path) == ["lock"]
    finally:
        for number in (at_start, started, at_end, ended):
            os.close(number)
        os.waitpid(child, 0)


def test_two_threads_do_not_write_one_folder(tmp_path):
    with FolderLock(tmp_path), pytest.raises(SnapshotError, match=f"held by process {os.getpid()}"):
        FolderLock(tmp_path).__enter__()
    with FolderLock(tmp_path):
        pass


@pytest.mark.parametrize("times", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_of_many_that_want_a_lock_one_has_it(tmp_path, times):
    inside, most, errors = [], [], []

    def work():
        for _ in range(times):
            try:
                with FolderLock(tmp_path):
                    inside.append(1)
                    most.append(len(inside))
                    inside.pop()
            except SnapshotError:
                errors.append(1)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1}
    assert names(tmp_path) == []


def test_a_snapshot_error_is_a_storage_error():
    assert issubclass(SnapshotError, StorageError)
    assert issubclass(SnapshotError, OSError)
