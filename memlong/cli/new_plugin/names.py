"""PluginNames: the names of a new plugin and its parts, and which names are invalid."""

from __future__ import annotations

import importlib.util
import keyword
import re
from collections.abc import Iterable
from dataclasses import dataclass

from memlong.errors import InvalidArgumentError
from memlong.plugins.names import normalize
from memlong.plugins.report import PluginReport

_NAME = re.compile(r"[a-z][a-z0-9]*(?:[._-][a-z0-9]+)*")
_OF_PYTHON = {normalize(word) for word in keyword.kwlist}
_MOST_LETTERS = 60


@dataclass(frozen=True)
class PluginNames:
    """The names of a plugin's parts, derived from the name of its backend, such as ``"my-index"``.

    Parameters
    ----------
    backend
        The backend's name: a lowercase letter first, then lowercase letters and digits, with single ``-``, ``_`` or
        ``.`` between them.

    Raises
    ------
    InvalidArgumentError
        If it cannot name both a backend and a Python package.
    """

    backend: str

    def __post_init__(self) -> None:
        name, words = self.backend, normalize(self.backend)
        if len(name) > _MOST_LETTERS:
            raise InvalidArgumentError(
                f"NAME must have at most {_MOST_LETTERS} characters, as files are named after it, got {len(name)}"
            )
        if not _NAME.fullmatch(name):
            raise InvalidArgumentError(
                "NAME must be a lowercase letter, then lowercase letters and digits, with '-', '_' or '.' between "
                f"them, got {name!r}. Try {_close_to(name)!r}"
            )
        if words == "memlong" or words.startswith("memlong_"):
            raise InvalidArgumentError(
                f"NAME must not start with 'memlong', which the package's name adds, got {name!r}. Try "
                f"{_close_to(name)!r}"
            )
        if words in _OF_PYTHON:
            raise InvalidArgumentError(
                f"NAME must not be a Python keyword, got {name!r}: choose another, such as '{name}-index'"
            )

    @property
    def distribution(self) -> str:
        """Name of the distribution, such as ``"memlong-my-index"``."""
        return self.package.replace("_", "-")

    @property
    def package(self) -> str:
        """Name of the Python package, such as ``"memlong_my_index"``."""
        return f"memlong_{normalize(self.backend)}"

    @property
    def index_class(self) -> str:
        """Name of the index class, such as ``"MyIndex"``."""
        name = "".join(word.capitalize() for word in normalize(self.backend).split("_"))
        return f"{name.removesuffix('Index')}Index"

    def refuse_taken(self, reports: Iterable[PluginReport]) -> None:
        """Raise if something installed already has one of these names.

        Parameters
        ----------
        reports
            Reports of all plugins found.

        Raises
        ------
        InvalidArgumentError
            If a plugin, distribution or backend has the name, or the package can already be imported.
        """
        name, another = self.backend, f"choose another name, such as 'my-{self.backend}'"
        for report in reports:
            if any(normalize(backend) == normalize(name) for backend in report.backends):
                raise InvalidArgumentError(
                    f"NAME {name!r} is taken by a backend of plugin {report.label}, and two backends of one name "
                    f"conflict: {another}"
                )
            theirs = {normalize(report.name), normalize(report.distribution)}
            if report.status != "missing" and theirs & {normalize(name), self.package}:
                raise InvalidArgumentError(
                    f"NAME {name!r} is taken by the installed plugin {report.label}, and disabling one of two plugins "
                    f"of one name disables both: {another}"
                )
        if importlib.util.find_spec(self.package) is not None:
            raise InvalidArgumentError(
                f"NAME {name!r} is taken by an installed Python package {self.package}: {another}"
            )


def _close_to(name: str) -> str:
    """Return a valid name close to an invalid one."""
    words = [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word]
    near = "-".join(words[1:] if words[:1] == ["memlong"] else words)
    if not _NAME.fullmatch(near) or normalize(near) in _OF_PYTHON:
        near = f"my-{near}" if near else "my-index"
    return near
