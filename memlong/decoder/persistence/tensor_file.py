"""Tensors in a safetensors file that says what it is, and for which layers: what maps and gates are kept in."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from memlong.bank.sessions.folders import at_home
from memlong.bank.snapshot.files import oddity
from memlong.bank.snapshot.tensors import has_long_header
from memlong.errors import InvalidArgumentError


def check_tensors(path: Path) -> None:
    """Raise ValueError if a file is not a regular one, or describes more tensors than are ever written."""
    if odd := oddity(path):
        raise ValueError(f"it {odd}")
    with path.open("rb") as file:
        if has_long_header(file.read(8)):
            raise ValueError("it describes more tensors than such a file ever holds")


def write_tensors(
    path: str | Path, kind: str, layers: tuple[int, ...], tensors: Mapping[str, Tensor]
) -> None:
    """Write tensors for some layers; as `write_file`."""
    write_file(path, kind, tensors, {"layers": json.dumps(layers)})


def write_file(path: str | Path, kind: str, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
    """Write tensors and facts; an existing file, or what a link leads to, is replaced once all is written.

    Raises
    ------
    OSError, SafetensorError
        If they cannot be written.
    """
    path = Path(path).resolve()
    if path.exists() and not path.is_file():  # which would be replaced, too
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(plain, path, metadata={"format": kind, **facts})


def read_tensors(
    path: str | Path, kind: str, *, field: str, command: str
) -> tuple[tuple[int, ...], dict[str, Tensor]]:
    """Read what `write_tensors` wrote: the layers, and tensors by name; as `read_file`."""
    facts, tensors = read_file(path, kind, field=field, command=command)
    try:
        return tuple(json.loads(facts["layers"])), tensors
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _unreadable(path, field, command, error) from error


def read_file(
    path: str | Path, kind: str, *, field: str, command: str
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read what `write_file` wrote: the facts, and tensors by name.

    Parameters
    ----------
    path
        The file.
    kind
        Of what kind it must be.
    field, command
        For messages: the setting that names the file, and the command that writes one.

    Raises
    ------
    InvalidArgumentError
        If the file is missing, damaged or of another kind, or a number in it is not finite.
    """
    try:
        path = at_home(path)
        check_tensors(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != kind:
                raise InvalidArgumentError(
                    f"{field} must name a file of format {kind!r}, as `{command}` writes it, got {str(path)!r} of "
                    f"format {metadata.get('format')!r}"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            for name, tensor in tensors.items():
                if not bool(tensor.isfinite().all()):
                    raise ValueError(f"{name} holds numbers that are not finite")
            return metadata, tensors
    except (OSError, SafetensorError, ValueError) as error:
        if isinstance(error, InvalidArgumentError):
            raise
        raise _unreadable(path, field, command, error) from error


@contextmanager
def making(path: str | Path, what: str, *, field: str, command: str) -> Iterator[None]:
    """Make something of a file's tensors; whatever is wrong with them raises InvalidArgumentError with its cause.

    ``what`` names what is made; the others are as for `read_file`.
    """
    try:
        yield
    except (KeyError, RuntimeError, ValueError, TypeError, RecursionError) as error:
        cause = f"it has no {error}" if isinstance(error, KeyError) else error
        raise InvalidArgumentError(
            f"{field} names {str(path)!r}, which holds no {what}: {cause}. Make the file with `{command}`"
        ) from error


def check_floating(*tensors: Tensor) -> None:
    """Raise TypeError if tensors hold integers."""
    if not all(each.is_floating_point() for each in tensors):
        raise TypeError("its numbers are integers")


def _unreadable(path: str | Path, field: str, command: str, error: Exception) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"{field} names {str(path)!r}, which cannot be read: {error}. Make the file with `{command}`"
    )
