"""Fields of a manifest, taken out one by one, each of the type and within the limits that it must have."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from memlong.bank.snapshot.files import damaged
from memlong.errors import SnapshotError

Choice = TypeVar("Choice", bound=str)

FILE_NAME = re.compile(
    r"(blocks|chunks|state|streams|documents)-[0-9]{1,15}-[0-9]{1,9}\.safetensors"
    r"|(index|matrix)-[0-9]{1,15}-[0-9]{1,9}\.bin"
)
"""What a file of a snapshot is called: it can lie nowhere but in the folder, and never is the manifest."""

_LONGEST = 4096


class Fields:
    """The fields of one JSON object.

    Parameters
    ----------
    data : object
        What the JSON says is there.
    path : Path
        Path of the manifest, for messages.
    where : str
        Which part of it this is, for messages.

    Raises
    ------
    SnapshotError
        Here and in every method, if something else is there than is expected.
    """

    def __init__(self, data: object, path: Path, where: str = "") -> None:
        self._path, self._where = path, where
        if not isinstance(data, dict):
            raise self.odd("", data, "an object")
        self._data: dict[str, Any] = dict(data)

    def integer(self, name: str, least: int = 0, most: int = 2**62) -> int:
        """Return an integer within limits."""
        value = self._take(name)
        if type(value) is not int or not least <= value <= most:
            raise self.odd(name, value, f"an integer from {least} to {most}")
        return value

    def integer_or_none(self, name: str, least: int, most: int = 2**62) -> int | None:
        """Return an integer within limits, or None."""
        return None if self._took_none(name) else self.integer(name, least, most)

    def integers(self, name: str, count: int, least: int, most: int) -> tuple[int, ...]:
        """Return the given number of integers, within limits."""
        value = self._take(name)
        if not isinstance(value, list) or len(value) != count:
            raise self.odd(name, value, f"{count} integers")
        for each in value:
            if type(each) is not int or not least <= each <= most:
                raise self.odd(name, value, f"integers from {least} to {most}")
        return tuple(value)

    def text(self, name: str) -> str:
        """Return a text that is not overly long."""
        value = self._take(name)
        if not isinstance(value, str) or len(value) > _LONGEST:
            raise self.odd(name, value, "text")
        return value

    def text_or_none(self, name: str) -> str | None:
        """Return a text, or None."""
        return None if self._took_none(name) else self.text(name)

    def choice(self, name: str, choices: tuple[Choice, ...]) -> Choice:
        """Return one of some texts."""
        value = self.text(name)
        for each in choices:
            if value == each:
                return each
        raise self.odd(name, value, " or ".join(choices))

    def hexadecimal(self, name: str, digits: int) -> str:
        """Return a string of the given number of hexadecimal digits."""
        value = self.text(name)
        if not re.fullmatch(f"[0-9a-f]{{{digits}}}", value):
            raise self.odd(name, value, f"{digits} hexadecimal digits")
        return value

    def file_name(self, name: str) -> str:
        """Return the name of a file in the folder itself."""
        value = self.text(name)
        if not FILE_NAME.fullmatch(value):
            raise self.odd(name, value, "the plain name of a file in the folder")
        return value

    def mapping(self, name: str) -> Mapping[str, Any]:
        """Return an object, whatever is in it."""
        value = self._take(name)
        if not isinstance(value, dict):
            raise self.odd(name, value, "an object")
        return value

    def mapping_or_none(self, name: str) -> Mapping[str, Any] | None:
        """Take what may be any object, or None."""
        return None if self._took_none(name) else self.mapping(name)

    def part(self, name: str) -> Fields:
        """Return the fields of an object in this one."""
        return Fields(self._take(name), self._path, self._place(name))

    def part_or_none(self, name: str) -> Fields | None:
        """Return the fields of an object, or None."""
        return None if self._took_none(name) else self.part(name)

    def parts(self, name: str) -> list[Fields]:
        """Return the fields of each object in a list."""
        value = self._take(name)
        if not isinstance(value, list):
            raise self.odd(name, value, "a list")
        return [Fields(each, self._path, f"{self._place(name)}[{n}]") for n, each in enumerate(value)]

    def nothing_else(self) -> None:
        """Raise unless every field has been taken."""
        for name, value in self._data.items():
            raise self.odd(name, value, "no such field")

    def _take(self, name: str) -> Any:
        if name not in self._data:
            raise damaged(self._path, f"has no {self._place(name)!r}")
        return self._data.pop(name)

    def _took_none(self, name: str) -> bool:
        if self._data.get(name, self) is not None:
            return False
        del self._data[name]
        return True

    def _place(self, name: str) -> str:
        return ".".join(part for part in (self._where, name) if part)

    def odd(self, name: str, value: object, expected: str) -> SnapshotError:
        """Return the error for a field that is not what was expected."""
        shown = repr(value)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        return damaged(self._path, f"has {self._place(name) or 'top'} = {shown}, expected {expected}")
