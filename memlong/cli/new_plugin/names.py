"""PluginNames: what a new plugin and its parts are called, and which names will not do."""

from __future__ import annotations

import importlib.util
import keyword
import re
from collections.abc import Iterable
from dataclasses import dataclass

from memlong.errors import InvalidArgumentError
from memlong.plugins.names import normalise
from memlong.plugins.report import PluginReport

_NAME = re.compile(r"[a-z][a-z0-9]*(?:[._-][a-z0-9]+)*")
_OF_PYTHON = {normalise(word) for word in keyword.kwlist}
_MOST_LETTERS = 60


@dataclass(frozen=True)
class PluginNames:
    """What a plugin's parts are called, all from the name of its backend, such as ``"my-index"``.

    Parameters
    ----------
    backend
        What users ask for: starts with a lower-case letter; then letters and digits, with ``-``, ``_`` or
        ``.`` between them.

    Raises
    ------
    InvalidArgumentError
        If it cannot be the name of a backend and of a Python package.
    """

    backend: str

    def __post_init__(self) -> None:
        name, words = self.backend, normalise(self.backend)
        if len(name) > _MOST_LETTERS:
            raise InvalidArgumentError(
                f"NAME has {len(name)} letters, expected at most {_MOST_LETTERS}: files are named after it"
            )
        if not _NAME.fullmatch(name):
            raise InvalidArgumentError(
                f"NAME {name!r} cannot name a backend and a Python package: expected a lower-case letter first, "
                f"then letters and digits, with '-', '_' or '.' between them.{_such_as(name)}"
            )
        if words == "memlong" or words.startswith("memlong_"):
            raise InvalidArgumentError(
                f"NAME {name!r} starts with 'memlong', which the package's own name will do: leave it out."
                + _such_as(name)
            )
        if words in _OF_PYTHON:
            raise InvalidArgumentError(
                f"NAME {name!r} is a word of the Python language, and nothing in a program can have that name. "
                f"Choose another, such as '{name}-index'"
            )

    @property
    def distribution(self) -> str:
        """The name that pip knows, such as ``"memlong-my-index"``."""
        return self.package.replace("_", "-")

    @property
    def package(self) -> str:
        """The name that Python imports, such as ``"memlong_my_index"``."""
        return f"memlong_{normalise(self.backend)}"

    @property
    def index_class(self) -> str:
        """The name of the class, such as ``"MyIndex"``."""
        name = "".join(word.capitalize() for word in normalise(self.backend).split("_"))
        return f"{name.removesuffix('Index')}Index"

    def refuse_taken(self, reports: Iterable[PluginReport]) -> None:
        """Raise if something that is installed has one of these names already.

        Parameters
        ----------
        reports
            Of all plugins that were found.

        Raises
        ------
        InvalidArgumentError
            If a plugin, its distribution or its backend has the name, or Python can import the package.
        """
        name, another = self.backend, f"Choose another name, such as 'my-{self.backend}'"
        for report in reports:
            if any(normalise(backend) == normalise(name) for backend in report.backends):
                raise InvalidArgumentError(
                    f"NAME {name!r} is taken: plugin {report.label} has a backend of this name, and of two with one "
                    f"name neither can be used. {another}"
                )
            theirs = {normalise(report.name), normalise(report.distribution)}
            if report.status != "missing" and theirs & {normalise(name), self.package}:
                raise InvalidArgumentError(
                    f"NAME {name!r} is taken: plugin {report.label} is installed, and whoever switches off one of two "
                    f"with one name switches off both. {another}"
                )
        if importlib.util.find_spec(self.package) is not None:
            raise InvalidArgumentError(
                f"NAME {name!r} is taken: Python finds a package {self.package} already, and would import that one. "
                + another
            )


def _such_as(name: str) -> str:
    """Return a name that would do in place of this one, as a sentence; nothing where there is none near."""
    words = [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word]
    near = "-".join(words[1:] if words[:1] == ["memlong"] else words)
    if not _NAME.fullmatch(near) or normalise(near) in _OF_PYTHON:
        near = f"my-{near}" if near else "my-index"
    return f" {near!r} would do"
