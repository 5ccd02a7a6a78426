"""Spec: what a plugin registers, a name and the import path of its class or function."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from memlong.errors import InvalidArgumentError
from memlong.plugins.names import brief

Kind = Literal["backend", "retriever", "eviction policy", "URI scheme"]

_NAME = re.compile(r"[a-z0-9]+(?:[._-][a-z0-9]+)*")
_SCHEME = re.compile(r"[a-z][a-z0-9]*(?:[.+-][a-z0-9]+)*")  # RFC 3986, lowercase only
_LONGEST_NAME, _LONGEST_TEXT, _MOST_REQUIRED = 100, 1_000, 100
_A = {"backend": "a", "retriever": "a", "eviction policy": "an", "URI scheme": "a"}


@dataclass(frozen=True)
class Spec:
    """A registered name and the import path of its class or function, which is imported on first use.

    Parameters
    ----------
    kind
        What is registered.
    name
        At most 100 lowercase letters and digits, with ``-``, ``_`` or ``.`` between them; in a URI scheme, ``+``
        instead of ``_``.
    target
        ``"module:Class"``, or ``"module:function"`` for a URI scheme.
    plugin
        Name of the plugin that registered it.
    requires
        Import names of the modules that it needs beyond memlong's dependencies.
    install
        The command that installs them.
    description
        One line for listings.

    Raises
    ------
    InvalidArgumentError
        If an argument is invalid.
    """

    kind: Kind
    name: str
    target: str
    plugin: str
    requires: tuple[str, ...] = ()
    install: str = ""
    description: str = ""

    def __post_init__(self) -> None:
        is_scheme = self.kind == "URI scheme"
        fits = (_SCHEME if is_scheme else _NAME).fullmatch
        if not isinstance(self.name, str) or len(self.name) > _LONGEST_NAME or not fits(self.name):
            raise InvalidArgumentError(
                f"The name of {_A[self.kind]} {self.kind} must be at most {_LONGEST_NAME} lowercase letters and "
                f"digits, with '-', {'+' if is_scheme else '_'!r} or '.' between them, such as 'my-index', got "
                f"{brief(self.name)}"
            )
        if not _is_target(self.target):
            raise InvalidArgumentError(
                f"target of {self.kind} {self.name!r} must be 'module:{'function' if is_scheme else 'Class'}', such as "
                f"'my_package.index:MyIndex', got {brief(self.target)}"
            )
        # A bare string is a likely mistake, and iterates over its letters.
        given = self.requires
        is_many = isinstance(given, Iterable) and not isinstance(given, str)
        modules = tuple(islice(given, _MOST_REQUIRED + 1)) if is_many else ()
        if not is_many or len(modules) > _MOST_REQUIRED or not all(map(_is_module, modules)):
            raise InvalidArgumentError(
                f"requires of {self.kind} {self.name!r} must be a tuple of at most {_MOST_REQUIRED} import names, such "
                f"as ('faiss',), got {brief(given)}"
            )
        object.__setattr__(self, "requires", modules)
        for field, value in (("install", self.install), ("description", self.description)):
            if not isinstance(value, str) or len(value) > _LONGEST_TEXT:
                raise InvalidArgumentError(
                    f"{field} of {self.kind} {self.name!r} must be text of at most {_LONGEST_TEXT:,} characters, got "
                    f"{brief(value)}"
                )

    def missing(self) -> tuple[str, ...]:
        """Return the modules in ``requires`` that are not installed, without importing any."""
        return tuple(module for module in self.requires if not _is_installed(module))


def _is_module(name: object) -> bool:
    return (
        isinstance(name, str)
        and len(name) <= _LONGEST_TEXT
        and all(part.isidentifier() for part in name.split("."))
    )


def _is_target(target: object) -> bool:
    if not isinstance(target, str):
        return False
    module, _, attribute = target.partition(":")
    return len(target) <= _LONGEST_TEXT and _is_module(module) and attribute.isidentifier()


def _is_installed(module: str) -> bool:
    # Only the top-level package: finding a submodule would import its parent.
    root = module.partition(".")[0]
    try:
        return importlib.util.find_spec(root) is not None
    except ValueError:
        # Already imported, but without a __spec__.
        return True
