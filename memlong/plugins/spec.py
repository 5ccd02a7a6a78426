"""Spec: what a plugin registers, a name and where the class or function behind it is found."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from typing import Literal

from memlong.errors import InvalidArgumentError

Kind = Literal["backend", "retriever", "eviction policy", "URI scheme"]

_NAME = re.compile(r"[a-z0-9]+(?:[._-][a-z0-9]+)*")
_SCHEME = re.compile(r"[a-z][a-z0-9]*(?:[.+-][a-z0-9]+)*")  # RFC 3986, in lower case
_A = {"backend": "a", "retriever": "a", "eviction policy": "an", "URI scheme": "a"}


@dataclass(frozen=True)
class Spec:
    """One registered name and what is behind it, which is imported only when it is asked for.

    Parameters
    ----------
    kind
        What it is.
    name
        What users ask for: lower-case letters and digits, with ``-``, ``_`` or ``.`` between them; in a URI scheme
        ``+`` instead of ``_``.
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
        if not isinstance(self.name, str) or not (_SCHEME if is_scheme else _NAME).fullmatch(self.name):
            raise InvalidArgumentError(
                f"name={self.name!r} cannot name {_A[self.kind]} {self.kind}: expected lower-case letters and digits, "
                f"with '-', {'+' if is_scheme else '_'!r} or '.' between them, such as 'my-index'"
            )
        if not _is_target(self.target):
            raise InvalidArgumentError(
                f"target={self.target!r} of {self.kind} {self.name!r} does not say where it is: "
                f"expected 'module:{'function' if is_scheme else 'Class'}', such as 'my_package.bank:MyBank'"
            )
        # A bare string is the likely slip, and it would be taken apart into letters.
        if isinstance(self.requires, str) or not all(_is_module(module) for module in self.requires):
            raise InvalidArgumentError(
                f"requires={self.requires!r} of {self.kind} {self.name!r} does not name modules: "
                "expected a tuple of import names, such as ('faiss',)"
            )
        object.__setattr__(self, "requires", tuple(self.requires))
        for field, value in (("install", self.install), ("description", self.description)):
            if not isinstance(value, str):
                raise InvalidArgumentError(
                    f"{field}={value!r} of {self.kind} {self.name!r} is not text: expected a string"
                )

    def missing(self) -> tuple[str, ...]:
        """Return those of ``requires`` that are not installed; imports none of them."""
        return tuple(module for module in self.requires if not _is_installed(module))

    def claims_same(self, other: Spec) -> bool:
        """Whether both stand for the same name of the same kind, so that only one of them can be meant."""
        return (self.kind, self.name) == (other.kind, other.name)


def _is_module(name: object) -> bool:
    return isinstance(name, str) and all(part.isidentifier() for part in name.split("."))


def _is_target(target: object) -> bool:
    if not isinstance(target, str):
        return False
    module, _, attribute = target.partition(":")
    return _is_module(module) and attribute.isidentifier()


def _is_installed(module: str) -> bool:
    # Only the first part: finding a submodule would import its parent.
    root = module.partition(".")[0]
    try:
        return importlib.util.find_spec(root) is not None
    except ValueError:
        # Already imported, by something that gave it no __spec__.
        return True
