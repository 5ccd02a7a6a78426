"""What a store may be given, checked without touching a disk or importing fsspec."""

from __future__ import annotations

from pathlib import Path

from memlong.bank.sessions.folders import not_a_uri
from memlong.bank.sizes import byte_count
from memlong.bank.store.codec import check_storage_dtype
from memlong.bank.store.folder import ObjectFolder
from memlong.bank.store.parallel import MOST_THREADS
from memlong.bank.validate import whole_number
from memlong.errors import InvalidArgumentError
from memlong.uri import local_path, without_credentials


def check_store(
    *,
    device: object = None,
    host: object = None,
    disk: object = None,
    disk_budget: object = None,
    objects: object = None,
    readers: object = 8,
    dtype: object = None,
) -> None:
    """Check the arguments of a `TieredStore`, which are these.

    Raises
    ------
    InvalidArgumentError
        If no tier is named, or an argument has a value that cannot be used.
    """
    check_storage_dtype(dtype)
    if disk is None and disk_budget is not None:
        raise InvalidArgumentError("disk_budget needs a folder: give one as disk")
    if device is None and host is None and disk is None and objects is None:
        raise InvalidArgumentError(
            "a store must have at least one of device, host, disk and objects, got none of them"
        )
    if disk is not None and objects is not None:
        raise InvalidArgumentError(
            "disk and objects cannot be combined, as each holds every block: give one of them"
        )
    if disk is not None:
        if not _is_path(disk):
            raise InvalidArgumentError(f"disk must be the path of a folder, got {disk!r}")
        not_a_uri(str(disk))
    if objects is not None and not isinstance(objects, ObjectFolder):
        if not _is_path(objects):
            raise InvalidArgumentError(
                "objects must be a folder, or a URI such as s3://bucket/folder, got "
                f"{without_credentials(repr(objects))}"
            )
        local_path(str(objects))
    whole_number("readers", readers, at_least=1, at_most=MOST_THREADS)
    for name, budget in (("device", device), ("host", host), ("disk_budget", disk_budget)):
        budget_of(name, budget)


def budget_of(name: str, given: object) -> int | None:
    """Return the budget of a tier in bytes; None is no limit."""
    return None if given is None or given == "all" else byte_count(name, given)  # type: ignore[arg-type]


def _is_path(given: object) -> bool:
    return isinstance(given, str | Path) and bool(str(given)) and "\0" not in str(given)
