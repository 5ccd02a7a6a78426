"""An extension of griffe: the parameters of settings classes, which are made of their fields when they are imported."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

import griffe

from memlong.settings import default_of


class Settings(griffe.Extension):
    """Puts what `memlong.settings.documented` wrote, and plain defaults, where griffe has read the source."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:  # noqa: ARG002 - as griffe calls it
        """Change each class that is decorated."""
        self._visit(pkg)

    def _visit(self, module: griffe.Module) -> None:
        for member in module.members.values():
            if member.is_alias:
                continue
            if isinstance(member, griffe.Module):
                self._visit(member)
            elif isinstance(member, griffe.Class) and any(
                "documented" in str(each.value) for each in member.decorators
            ):
                self._document(member)

    def _document(self, member: griffe.Class) -> None:
        settings = griffe.dynamic_import(member.path)
        member.docstring = griffe.Docstring(inspect.cleandoc(settings.__doc__ or ""), parent=member)
        for each in fields(settings):  # before griffe makes the parameters of `__init__` of them
            member.members[each.name].value = repr(default_of(each))
