"""What a file or a folder may become that nobody wrote: JSON, safetensors and folders, changed in their structure."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Rng = random.Random

_DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I8": 1, "U8": 1, "U32": 4, "BOOL": 1}
_ODD_DTYPES = ["F8_E4M3", "F4", "C64", "U64", "X", "", 3, None, [], "\x1b[31m"]


def odd_value(rng: Rng) -> Any:
    numbers = [
        0,
        -1,
        1,
        2,
        7,
        2**31,
        2**53,
        2**62,
        2**63,
        -(2**63),
        10**400,
        1.5,
        -0.0,
        1e308,
        math.nan,
        math.inf,
    ]
    texts = [
        "",
        "x",
        "x" * 5000,
        "\x1b[31m",
        "../..",
        "/etc/passwd",
        "a\0b",
        "\ud800",
        "0-999999999",
        "all",
        "cuda:99",
    ]
    deep: Any = rng.choice([[], {}, 1])
    for _ in range(rng.choice([3, 100, 400, 900])):
        deep = [deep] if rng.random() < 0.5 else {"a": deep}
    others = [None, True, False, [], {}, [[]] * 3, {"a": 1}, [0] * 10_000, ["x"] * 5000, deep]
    return rng.choice(rng.choice([numbers, texts, others]))


def places(data: Any) -> list[tuple[Any, Any]]:
    """Every container with every key in it, without recursion."""
    found, todo = [], [data]
    while todo:
        one = todo.pop()
        keys = list(one) if isinstance(one, dict) else range(len(one)) if isinstance(one, list) else ()
        for key in keys:
            found.append((one, key))
            todo.append(one[key])
    return found


def mutate_json(data: Any, rng: Rng) -> str:
    """Change one thing of a JSON object, or a few; return what was done."""
    said = []
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        found = places(data)
        if not found:
            break
        home, key = rng.choice(found)
        value = home[key]
        kind = rng.choice(["odd", "odd", "number", "remove", "add", "repeat", "swap", "wrap"])
        if kind == "odd" or (kind == "number" and not isinstance(value, int | float)):
            home[key] = odd_value(rng)
        elif kind == "number":
            home[key] = rng.choice(
                [value + 1, value - 1, -value, value * 2, value // 2 if value == value else 0]
            )
        elif kind == "remove":
            del home[key]
        elif kind == "add" and isinstance(home, dict):
            home[rng.choice(["more", "", "\x1b[31m", "x" * 3000])] = odd_value(rng)
        elif kind == "repeat" and isinstance(home, list):
            home.extend(
                [value] * (1 if isinstance(value, list) and len(value) > 100 else rng.choice([1, 2, 1000]))
            )
        elif kind == "swap":
            other, place = rng.choice(found)
            if place in other if isinstance(other, dict) else place < len(other):
                home[key], other[place] = json.loads(json.dumps(other[place])), json.loads(json.dumps(value))
        else:
            home[key] = rng.choice([[value], {"a": value}, str(value)[:9000]])
        said.append(f"{kind} {key!r:.30}")
    return ", ".join(said)


def raw_json(rng: Rng) -> bytes:
    """Bytes where JSON was expected."""
    return rng.choice(
        [
            b"", b"{", b"null", b"3", b'"x"', b"[]", b"{}", b"\xff\xfe", b"\xef\xbb\xbf{}", b"NaN", b"9" * 10_000,
            b"[" * 100_000, b'{"a":' * 100_000, b"\0" * 4096, b"[" + b"[]," * 1_000_000 + b"[]]",
            b'{"a": 1, "a": 2}', b"[1e999]", b'"\\ud800"', b"{" + b" " * 5_000_000 + b"}",
        ]
    )  # fmt: skip


def parsed(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and payload of a safetensors file."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def joined(header: Any, payload: bytes) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + payload


def mutate_tensors(content: bytes, rng: Rng) -> tuple[bytes, str]:
    """Change a safetensors file: its header's lies, or, with a header that fits, other tensors."""
    change = rng.choice(
        [_lie, _lie, _retell, _retell, _renumber, _renumber, _renumber, _rename, _raw, _mutate_header]
    )
    made, said = change(content, rng)
    return made, f"{change.__name__} {said}"


def _one(header: dict[str, Any], rng: Rng) -> str | None:
    names = [name for name in header if name != "__metadata__"]
    return rng.choice(names) if names else None


def _mutate_header(content: bytes, rng: Rng) -> tuple[bytes, str]:
    header, payload = parsed(content)
    said = mutate_json(header, rng)
    return joined(header, payload), said


def _lie(content: bytes, rng: Rng) -> tuple[bytes, str]:
    header, payload = parsed(content)
    name = _one(header, rng)
    if name is None:
        return content, "nothing"
    entry, size = header[name], len(payload)
    kind = rng.choice(["offsets", "shape", "dtype"])
    if kind == "offsets":
        start, end = entry["data_offsets"]
        entry[f"data_{kind}"] = rng.choice(
            [
                [0, size],
                [end, start],
                [0, 2**40],
                [start, end + 4],
                [-4, end],
                [2**63, 2**63 + 4],
                [start + 4, end],
                [],
            ]
        )
    elif kind == "shape":
        shape = entry["shape"]
        entry["shape"] = rng.choice(
            [
                [],
                [0],
                [2**40],
                [0, 2**60],
                [2**32, 2**32],
                [*shape, 1],
                shape[1:],
                [-1, *shape[1:]],
                shape * 40,
            ]
        )
    else:
        entry["dtype"] = rng.choice([*_DTYPES, *_ODD_DTYPES])
    return joined(header, payload), f"{kind} {name}"


def _retell(content: bytes, rng: Rng) -> tuple[bytes, str]:
    """A tensor of another shape or dtype, of which the header tells the truth."""
    header, payload = parsed(content)
    name = _one(header, rng)
    if name is None:
        return content, "nothing"
    entry = header[name]
    shape, start = list(entry["shape"]), entry["data_offsets"][0]
    kind = rng.choice(["axis", "dtype", "flat", "more", "turned"])
    if kind == "axis" and shape:
        axis = rng.randrange(len(shape))
        shape[axis] = rng.choice(
            [0, 1, 2, 3, max(0, shape[axis] - 1), shape[axis] + 1, 2 * shape[axis], 50_000]
        )
    elif kind == "dtype":
        entry["dtype"] = rng.choice(list(_DTYPES))
    elif kind == "flat":
        shape = rng.choice([[math.prod(shape)], [1, *shape], [*shape, 1], [0, *shape], []])
    elif kind == "turned":
        shape = shape[::-1]
    else:
        shape = [rng.choice([1, 100, 1000]), *shape]
    count = math.prod(shape) * _DTYPES.get(entry["dtype"], 1)
    if count > 1 << 24:
        return content, "too large"
    old = payload[start : entry["data_offsets"][1]] or b"\0"
    entry["shape"] = shape
    return _packed(header, payload, {name: (old * (count // len(old) + 1))[:count]}), f"{kind} {name} {shape}"


def _renumber(content: bytes, rng: Rng) -> tuple[bytes, str]:
    """A tensor of the same shape that holds other numbers."""
    header, payload = parsed(content)
    name = _one(header, rng)
    kinds = {"I64": np.int64, "F32": np.float32, "U32": np.uint32, "I8": np.int8, "BOOL": np.uint8}
    if name is None or header[name]["dtype"] not in kinds:
        return content, "nothing"
    start, end = header[name]["data_offsets"]
    numbers = np.frombuffer(payload[start:end], dtype=kinds[header[name]["dtype"]]).copy()
    if not len(numbers):
        return content, "nothing"
    place, info = rng.randrange(len(numbers)), np.iinfo if numbers.dtype.kind in "iu" else np.finfo
    few: list[Any] = [0, 1, info(numbers.dtype).max, info(numbers.dtype).min, 96, 97, 100]
    few += [math.nan, math.inf, -math.inf, 1e30, -1e30] if numbers.dtype.kind == "f" else []
    changes: list[Callable[[], Any]] = [
        lambda: numbers.__setitem__(place, rng.choice(few)),
        lambda: numbers.__setitem__(slice(None), rng.choice(few)),
        lambda: numbers.__setitem__(slice(None), numbers[::-1].copy()),
        lambda: rng.shuffle(numbers),
        lambda: numbers.__iadd__(numbers.dtype.type(1)),
        lambda: numbers.__imul__(numbers.dtype.type(7)),
    ]
    which = rng.randrange(len(changes))
    with np.errstate(all="ignore"):
        changes[which]()
    return joined(header, payload[:start] + numbers.tobytes() + payload[end:]), f"change {which} {name}"


def _rename(content: bytes, rng: Rng) -> tuple[bytes, str]:
    header, payload = parsed(content)
    name, other = _one(header, rng), _one(header, rng)
    if name is None or other is None:
        return content, "nothing"
    kind = rng.choice(["drop", "swap", "rename", "copies", "none"])
    if kind == "drop":
        del header[name]
    elif kind == "swap":
        header[name], header[other] = header[other], header[name]
    elif kind == "rename":
        header[rng.choice(["", "x", f"{name}s", "\x1b[31m", "row.99.recent", "x" * 9000])] = header.pop(name)
    elif kind == "copies":
        header |= {f"{name}.{number}": dict(header[name]) for number in range(rng.choice([1, 3000]))}
    else:
        header = {each: value for each, value in header.items() if each == "__metadata__"}
    return _packed(header, payload, {}), f"{kind} {name}"


def _raw(content: bytes, rng: Rng) -> tuple[bytes, str]:
    which = rng.randrange(8)
    size, header = len(content), content[8:]
    entry = b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    made: bytes = [
        lambda: content[: rng.randrange(size)],
        lambda: content + bytes(rng.randrange(1, 9000)),
        lambda: rng.choice([2**63, 2**64 - 1, 2**40, 99_999_999, 0, 1, size]).to_bytes(8, "little") + header,
        lambda: bytes(size),
        lambda: rng.randbytes(size),
        lambda: _with_text(raw_json(rng)),
        lambda: _with_text(b'{"a":' * 100_000),
        lambda: _with_text(b"{" + b",".join(entry % number for number in range(50_000)) + b"}"),
    ][which]()
    return made, f"{which}"


def _with_text(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


def _packed(header: dict[str, Any], payload: bytes, changed: dict[str, bytes]) -> bytes:
    """Lay the tensors out again, so that the offsets are true."""
    made, parts, at = {}, [], 0
    for name, entry in header.items():
        if name == "__metadata__":
            made[name] = entry
            continue
        part = changed.get(name, payload[slice(*entry["data_offsets"])])
        made[name] = {**entry, "data_offsets": [at, at + len(part)]}
        parts.append(part)
        at += len(part)
    return joined(made, b"".join(parts))


def mutate_folder(folder: Path, rng: Rng) -> str:
    """Put something else in place of a file, or beside it."""
    path = rng.choice(sorted(folder.iterdir()))
    change = rng.choice(_CHANGES)
    change(path, rng)
    return f"{change.__name__} {path.name}"


def _removed(path: Path, rng: Rng) -> None:
    path.unlink()


def _emptied(path: Path, rng: Rng) -> None:
    path.write_bytes(b"")


def _cut(path: Path, rng: Rng) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size or 1))


def _grown(path: Path, rng: Rng) -> None:
    with path.open("ab") as file:
        file.write(rng.randbytes(rng.randrange(1, 5000)))


def _sparse(path: Path, rng: Rng) -> None:
    os.truncate(path, rng.choice([10_000_000, 200_000_000, 300_000_000, 40_000_000_000]))


def _flipped(path: Path, rng: Rng) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def _folder(path: Path, rng: Rng) -> None:
    path.unlink()
    path.mkdir()
    if rng.random() < 0.5:
        (path / "x").write_bytes(b"x")


def _fifo(path: Path, rng: Rng) -> None:
    path.unlink()
    os.mkfifo(path)


def _socket(path: Path, rng: Rng) -> None:
    path.unlink()
    with socket.socket(socket.AF_UNIX) as listener:
        here = Path.cwd()
        os.chdir(path.parent)  # a socket's path is short
        try:
            listener.bind(path.name)
        finally:
            os.chdir(here)


def _link(path: Path, rng: Rng) -> None:
    beside = path.parent.parent / "away"
    shutil.copyfile(path, beside)
    target = rng.choice(
        [Path("/etc/passwd"), Path("/dev/zero"), Path(path.name), beside, Path("nowhere"), path.parent]
    )
    path.unlink()
    path.symlink_to(target)


def _swapped(path: Path, rng: Rng) -> None:
    other = rng.choice(sorted(path.parent.iterdir()))
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


def _stranger(path: Path, rng: Rng) -> None:
    name = rng.choice(
        [
            "x.json",
            "adapter_model.bin",
            "pytorch_model.bin",
            "lock",
            ".hidden",
            "x" * 200,
            "a\nb",
            "index-1-1.bin",
        ]
    )
    other = path.with_name(name)
    if not other.exists():
        rng.choice([lambda: other.write_bytes(b"x"), other.mkdir, lambda: os.mkfifo(other)])()


_CHANGES = (
    _removed, _emptied, _cut, _grown, _sparse, _flipped, _folder, _fifo, _socket, _link, _swapped, _stranger,
)  # fmt: skip
