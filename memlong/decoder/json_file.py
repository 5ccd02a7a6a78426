"""Small JSON files that may be a stranger's: read within bounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from memlong.bank.snapshot.files import oddity

_MOST_BYTES = 4 << 20


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a file.

    Raises
    ------
    OSError
        If the file is not there, or cannot be read.
    ValueError
        If it is no plain file, larger than any that memlong or peft writes, or holds no JSON object.
    """
    if odd := oddity(path):
        raise ValueError(f"it {odd}")
    with path.open("rb") as file:
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise ValueError(f"it has more than {_MOST_BYTES:,} bytes")
    try:
        found = json.loads(content)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}, and no object")
    return found
