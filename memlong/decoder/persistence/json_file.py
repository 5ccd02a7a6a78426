"""Small JSON files that may be a stranger's: read within bounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from memlong.bank.snapshot.files import oddity

_MOST_BYTES = 4 << 20


def read_json(path: Path, most_bytes: int = _MOST_BYTES) -> dict[str, Any]:
    """Return the object in a file.

    Parameters
    ----------
    path
        The file.
    most_bytes
        That it may have.

    Raises
    ------
    OSError
        If the file is not there, or cannot be read.
    ValueError
        If it is not a regular file, larger than any that memlong or peft writes, or holds no JSON object.
    """
    if odd := oddity(path):
        raise ValueError(f"it {odd}")
    with path.open("rb") as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise ValueError(f"it has more than {most_bytes:,} bytes")
    try:
        found = json.loads(content)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}, and no object")
    return found
