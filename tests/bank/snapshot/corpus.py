"""Corrupted snapshots, made by a seed, each loaded and judged: one line of JSON a case.

python tests/bank/snapshot/corpus.py FOLDER FIRST COUNT
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch

from memlong import Registry, SnapshotError, create_bank
from memlong.bank.snapshot.manifest import _dumped
from memlong.testing.harness import DIM, random_chunks, random_vectors

BACKENDS = {"torch": {}, "faiss": {"index": "HNSW16"}, "hnswlib": {"initial_capacity": 8}}
COUNT = 24


def pristine(folder: Path) -> None:
    """Save a small bank of each backend in two segments, and a stranger to take files from."""
    for name, options in BACKENDS.items():
        for kind, seed in ((name, 0), (f"{name}-other", 50)):
            bank = create_bank(name, DIM, max_chunks=100, **options)
            for first in (0, COUNT // 2):
                random_chunks(COUNT // 2, seed=seed + first, first=20 * seed + first).into(bank)
                bank.retrieve(random_vectors(2, seed=first), 3)
                bank.save(folder / kind)


def manifest(folder: Path) -> dict[str, Any]:
    data = json.loads((folder / "manifest.json").read_bytes())
    del data["sha256"]
    return data


def forge(folder: Path, data: dict[str, Any]) -> None:
    (folder / "manifest.json").write_bytes(_dumped(data))


def records(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Every file that a manifest names."""
    bank = data["banks"][0]
    index = [bank["index"]["file"]] if bank["index"] else []
    return [
        bank["state"],
        *(each[kind] for each in bank["segments"] for kind in ("chunks", "blocks")),
        *index,
    ]


# Files that are damaged.


def flip_a_bit(folder: Path, rng: random.Random) -> None:
    path = any_file(folder, rng)
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def cut(folder: Path, rng: random.Random) -> None:
    path = any_file(folder, rng)
    with path.open("r+b") as file:
        file.truncate(rng.randrange(path.stat().st_size))


def grow(folder: Path, rng: random.Random) -> None:
    with any_file(folder, rng).open("ab") as file:
        file.write(rng.randbytes(rng.randrange(1, 5000)))


def overwrite(folder: Path, rng: random.Random) -> None:
    path = any_file(folder, rng)
    content = bytearray(path.read_bytes())
    start = rng.randrange(len(content))
    end = min(len(content), start + rng.randrange(1, 600))
    fresh = rng.randbytes(end - start)
    content[start:end] = fresh if fresh != content[start:end] else bytes(each ^ 255 for each in fresh)
    path.write_bytes(content)


def remove(folder: Path, rng: random.Random) -> None:
    any_file(folder, rng).unlink()


def swap(folder: Path, rng: random.Random) -> None:
    one, other = rng.sample(sorted(folder.iterdir()), 2)
    beside = folder / "beside"
    one.rename(beside)
    other.rename(one)
    beside.rename(other)


def take_from_a_stranger(folder: Path, rng: random.Random) -> None:
    other = Path(os.environ["PRISTINE"]) / f"{folder.name}-other"
    names = [path.name for path in sorted(folder.iterdir()) if path.name != "manifest.json"]
    name = rng.choice([name for name in names if (other / name).read_bytes() != (folder / name).read_bytes()])
    shutil.copyfile(other / name, folder / name)


def link(folder: Path, rng: random.Random) -> None:
    path = any_file(folder, rng)
    target = rng.choice([Path("/etc/passwd"), Path("/dev/zero"), folder.parent / "away", Path(path.name)])
    if target.name == "away":
        shutil.copyfile(path, target)  # the very same content, but elsewhere
    path.unlink()
    path.symlink_to(target)


def something_else(folder: Path, rng: random.Random) -> None:
    path = any_file(folder, rng)
    path.unlink()
    rng.choice([path.mkdir, lambda: os.mkfifo(path)])()


# Manifests that are forged, their own hash included.


def rename_away(folder: Path, rng: random.Random) -> None:
    data = manifest(folder)
    names = [
        "../x.bin",
        "/etc/passwd",
        "a/b",
        "..",
        ".",
        "",
        "manifest.json",
        "lock",
        "x\0y",
        "C:\\x",
        "blocks-1-1",
    ]
    rng.choice(records(data))["name"] = rng.choice(names)
    forge(folder, data)


def claim(folder: Path, rng: random.Random) -> None:
    data = manifest(folder)
    bank = data["banks"][0]
    segment = rng.choice(bank["segments"])
    places = [(bank, "dim"), (bank, "count"), (bank, "clock"), (bank, "next_id"), (segment, "count")]
    places += [(each, "nbytes") for each in records(data)]
    place, name = rng.choice(places)
    low = (
        [0, 1, -1, place[name] - 1]
        if name in ("clock", "next_id")
        else [0, -1, place[name] - 1, place[name] + 1]
    )
    huge = [] if name in ("clock", "next_id") else [2**31, 2**47, 10**18]
    place[name] = rng.choice([value for value in [*low, *huge, 2**63, 10**400] if value != place[name]])
    forge(folder, data)


def another_type(folder: Path, rng: random.Random) -> None:
    data = manifest(folder)
    bank = data["banks"][0]
    parts = [data, bank, bank["layout"], bank["segments"][0], *records(data)]
    part = rng.choice(parts)
    name = rng.choice([name for name in part if name not in ("options", "versions", "index", "origin")])
    options = [[], {}, 1.5, True, "x" * 5000, [[]] * 3, {"a": 1}, -7]
    if name not in ("extra", "corpus", "max_chunks", "max_bytes", "layout"):
        options.append(None)
    if name not in ("made_by", "device"):
        options.append("x")
    if name == "extra":
        options.remove([])
    part[name] = rng.choice(options)
    forge(folder, data)


def lose_or_add_a_field(folder: Path, rng: random.Random) -> None:
    data = manifest(folder)
    bank = data["banks"][0]
    part = rng.choice([data, bank, bank["layout"], bank["segments"][0], *records(data)])
    if rng.random() < 0.5:
        del part[rng.choice(list(part))]
    else:
        part["more"] = 1
    forge(folder, data)


def another_layout(folder: Path, rng: random.Random) -> None:
    data = manifest(folder)
    layout = data["banks"][0]["layout"]
    if rng.random() < 0.5:
        layout["shape"][rng.randrange(4)] = rng.choice([0, 1, 7, 2**20, 2**62])
    else:
        layout["dtype"] = rng.choice(["float64", "float16", "bfloat16", "int8", "object", "float8_e5m2"])
    forge(folder, data)


def segments_twice(folder: Path, rng: random.Random) -> None:
    data = manifest(folder)
    segments = data["banks"][0]["segments"]
    change = rng.choice([lambda: segments.append(segments[0]), lambda: segments.pop(), segments.clear])
    change()
    forge(folder, data)


def another_version(folder: Path, rng: random.Random) -> None:
    data = manifest(folder)
    data[rng.choice(["version", "format", "kind"])] = rng.choice([0, 1, 2, "memlong-bank", "decoder", "99"])
    forge(folder, data)


def no_json(folder: Path, rng: random.Random) -> None:
    content = [b"", b"{", b"[" * 100_000, b"null", b"{}", b"\xff\xfe", b'{"a":' * 5000, b"NaN", b"1" * 10_000]
    (folder / "manifest.json").write_bytes(rng.choice(content))


# Tensors that are forged, and the hashes of their files.


def forge_arrays(folder: Path, rng: random.Random) -> None:
    data = manifest(folder)
    bank = data["banks"][0]
    changes: list[tuple[str, str, Callable[[Any], Any]]] = [
        ("state", "ids", lambda ids: ids[::-1].copy()),
        ("state", "ids", lambda ids: ids + 1),
        ("state", "ids", lambda ids: ids - 1),
        ("state", "ids", lambda ids: ids * 10**9),
        ("state", "ids", lambda ids: np.zeros_like(ids)),
        ("state", "retrievals", lambda counts: counts - 100),
        ("state", "last_used", lambda times: times + 10**6),
        ("state", "last_used", lambda times: times[:-1].copy()),
        ("state", "ids", lambda ids: ids.astype(np.float64)),
        ("chunks", "ids", lambda ids: ids[::-1].copy()),
        ("chunks", "ids", lambda ids: ids + 10**6),
        ("chunks", "ids", lambda ids: -ids - 1),
        ("chunks", "spans", lambda spans: spans[:, ::-1].copy()),
        ("chunks", "spans", lambda spans: spans - 10**6),
        ("chunks", "embeddings", lambda vectors: vectors * np.float32(np.nan)),
        ("chunks", "embeddings", lambda vectors: vectors * np.float32(np.inf)),
        ("chunks", "embeddings", lambda vectors: vectors * np.float32(3)),
        ("chunks", "embeddings", lambda vectors: vectors[:, :-1].copy()),
        ("chunks", "embeddings", lambda vectors: vectors.astype(np.float64)),
    ]
    kind, name, change = rng.choice(changes)
    record = bank["state"] if kind == "state" else rng.choice(bank["segments"])["chunks"]
    path = folder / record["name"]
    arrays = safetensors.numpy.load(path.read_bytes())
    arrays[name] = change(arrays[name])
    if rng.random() < 0.2:
        arrays[f"{name}s"] = arrays.pop(name)
    settle(path, record, safetensors.numpy.save(arrays))
    forge(folder, data)


def forge_blocks(folder: Path, rng: random.Random) -> None:
    data = manifest(folder)
    record = rng.choice(data["banks"][0]["segments"])["blocks"]
    path = folder / record["name"]
    content = bytearray(path.read_bytes())
    if rng.random() < 0.5:
        place = len(content) - 4 * rng.randrange(1, 200)
        content[place : place + 4] = struct.pack("<f", rng.choice([float("nan"), float("inf")]))
    else:
        header = 8 + int.from_bytes(content[:8], "little")
        content[rng.randrange(header)] ^= 1 << rng.randrange(8)
    settle(path, record, bytes(content))
    forge(folder, data)


def forge_any_bytes(folder: Path, rng: random.Random) -> None:
    data = manifest(folder)
    record = rng.choice([each for each in records(data) if each["name"].endswith("safetensors")])
    path = folder / record["name"]
    size = rng.choice([0, 7, 8, record["nbytes"]])
    content = rng.choice([rng.randbytes(size), b"\xff" * size, (2**40).to_bytes(8, "little") + bytes(size)])
    settle(path, record, content)
    forge(folder, data)


def settle(path: Path, record: dict[str, Any], content: bytes) -> None:
    path.write_bytes(content)
    record["nbytes"], record["sha256"] = len(content), hashlib.sha256(content).hexdigest()


def forge_the_index(folder: Path, rng: random.Random) -> None:
    """A file that would crash its library, hash and all: it is not to be given to it."""
    data = manifest(folder)
    index = data["banks"][0]["index"]
    if index is None:
        flip_a_bit(folder, rng)
        return
    path = folder / index["file"]["name"]
    content = bytearray(path.read_bytes())
    for _ in range(20):
        content[rng.randrange(len(content))] = rng.randrange(256)
    settle(path, index["file"], bytes(content))
    forge(folder, data)


def forge_options(folder: Path, rng: random.Random) -> None:
    """Options that crash or fill the memory, if a backend lets them."""
    data = manifest(folder)
    bank = data["banks"][0]
    absurd = ["HNSW0", "HNSW1", "HNSW999999999", "Pad999999999,Flat", "IVF999999999,Flat", "IMI2x24,Flat"]
    absurd += [
        "PQ4x24",
        "IVF4_HNSW1,Flat",
        "IVF4,PQ4x24",
        "LSH99999999",
        "NSG999999",
        "9" * 5000,
        "Flat" * 99,
        "",
    ]
    names = [name for name, value in bank["options"].items() if value is not None] or ["more"]
    name = rng.choice(names)
    huge = [2**24, 2**31, 2**40, 2**70, 10**400, 0, -1, 1.5, True, None, [], {}, "x"]
    bank["options"][name] = rng.choice(absurd if name == "index" else huge)
    if rng.random() < 0.3 and "initial_capacity" in names:
        bank["options"] |= {"initial_capacity": 2**20, "M": 512}
    forge(folder, data)


def any_file(folder: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(folder.iterdir()))


DAMAGES = (
    flip_a_bit,
    cut,
    grow,
    overwrite,
    remove,
    swap,
    take_from_a_stranger,
    link,
    something_else,
    rename_away,
    claim,
    another_type,
    lose_or_add_a_field,
    another_layout,
    segments_twice,
    another_version,
    no_json,
    forge_arrays,
    forge_blocks,
    forge_any_bytes,
    forge_the_index,
    forge_options,
)


def judge(folder: Path, registry: Registry, rng: random.Random) -> tuple[str, str]:
    """Load, look at everything, and say what came of it."""
    lazy, into = rng.random() < 0.3, rng.choice([None, *BACKENDS])
    try:
        bank = registry.load_bank(folder, into, lazy=lazy)
        got = bank.fetch(range(COUNT))
        found = bank.retrieve(random_vectors(3), 5)
    except SnapshotError as error:
        return ("refused" if str(folder) in str(error) else "refused without a name"), str(error)
    numbers = torch.arange(COUNT).view(-1, 1, 1, 1, 1)
    same = bool((got.keys == numbers).all() and (got.values == -numbers).all()) and len(bank) == COUNT
    same &= bool((found.keys == found.ids.view(3, 5, 1, 1, 1, 1)).all())
    return ("same" if same else "WRONG DATA"), f"lazy={lazy} into={into}"


def main(folder: Path, first: int, count: int) -> None:
    torch.set_num_threads(1)
    os.environ["PRISTINE"] = str(folder / "pristine")
    if not (folder / "pristine").exists():
        pristine(folder / "pristine")
    registry = Registry()
    for case in range(first, first + count):
        rng = random.Random(case)  # noqa: S311
        damage, name = rng.choice(DAMAGES), rng.choice(list(BACKENDS))
        work = folder / f"work-{first}"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        shutil.copytree(folder / "pristine" / name, work / name)
        line = {"case": case, "damage": damage.__name__, "backend": name}
        print(json.dumps(line | {"outcome": "began"}), flush=True)
        try:
            damage(work / name, rng)
            outcome, said = judge(work / name, registry, rng)
        except Exception as error:  # noqa: BLE001
            outcome, said = "ERROR", f"{type(error).__name__}: {error}"
        print(json.dumps(line | {"outcome": outcome, "said": said[:300]}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
