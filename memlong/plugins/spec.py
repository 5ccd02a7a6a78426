"""Spec: what a plugin registers, a name and where the class or function behind it is found."""

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
_SCHEME = re.compile(r"[a-z][a-z0-9]*(?:[.+-][a-z0-9]+)*")  # RFC 3986, in lower case
_LONGEST_NAME, _LONGEST_TEXT, _MOST_REQUIRED = 100, 1_000, 100
_A = {"backend": "a", "retriever": "a", "eviction policy": "an", "URI scheme": "a"}


@dataclass(frozen=True)
class Spec:
    """One registered name and what is behind it, which is imported only when it is asked for.

    Parameters
    ----------
    kind
        What it is.
    name
        What users ask for: at most 100 lower-case letters and digits, with ``-``, ``_`` or ``.`` between them; in a
        URI scheme ``+`` instead of ``_``.
    target
        ``"module:Class"``, for a URI scheme ``"module:function"``.
    plugin
        The name of the plugin that registered it.
    requires
        The modules that it needs and memlong itself does not bring, as they are imported.
    install
        The command that installs them.
    description
        One line for listings.

    Raises
    ------
    InvalidArgumentError
        If an argument cannot be used.
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
                f"name={brief(self.name)} cannot name {_A[self.kind]} {self.kind}: expected at most {_LONGEST_NAME} "
                f"lower-case letters and digits, with '-', {'+' if is_scheme else '_'!r} or '.' between them, such as "
                "'my-index'"
            )
        if not _is_target(self.target):
            raise InvalidArgumentError(
                f"target={brief(self.target)} of {self.kind} {self.name!r} does not say where it is: "
                f"expected 'module:{'function' if is_scheme else 'Class'}', such as 'my_package.index:MyIndex'"
            )
        # A bare string is the likely slip, and it would be taken apart into letters.
        given = self.requires
        is_many = isinstance(given, Iterable) and not isinstance(given, str)
        modules = tuple(islice(given, _MOST_REQUIRED + 1)) if is_many else ()
        if not is_many or len(modules) > _MOST_REQUIRED or not all(map(_is_module, modules)):
            raise InvalidArgumentError(
                f"requires={brief(given)} of {self.kind} {self.name!r} does not name modules: "
                f"expected a tuple of import names, such as ('faiss',), at most {_MOST_REQUIRED}"
            )
        object.__setattr__(self, "requires", modules)
        for field, value in (("install", self.install), ("description", self.description)):
            if not isinstance(value, str) or len(value) > _LONGEST_TEXT:
                raise InvalidArgumentError(
                    f"{field}={brief(value)} of {self.kind} {self.name!r} is not a line of text: expected a string of "
                    f"at most {_LONGEST_TEXT:,} characters"
                )

    def missing(self) -> tuple[str, ...]:
        """Return those of ``requires`` that are not installed; imports none of them."""
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
    # Only the first part: finding a submodule would import its parent.
    root = module.partition(".")[0]
    try:
        return importlib.util.find_spec(root) is not None
    except ValueError:
        # Already imported, by something that gave it no __spec__.
        return True
