"""Find the options that a class accepts from its constructors, and check given options against them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from dataclasses import fields
from typing import Any

from memlong.errors import InvalidArgumentError
from memlong.plugins.names import brief, did_you_mean, quoted
from memlong.settings import default_of, types_of


def accepted_options(cls: type, *, besides: Collection[str] = ()) -> tuple[str, ...]:
    """Return the names of the options that ``cls`` accepts, its own first, then those of its base classes.

    A constructor with ``**options`` is assumed to pass them to the next one in the MRO.

    Parameters
    ----------
    cls
        The class to construct.
    besides
        Parameters that are not options because the caller always gives them.
    """
    return tuple(name for name in option_parameters(cls) if name not in besides)


def option_parameters(cls: type) -> dict[str, inspect.Parameter]:
    """Return the parameters that `accepted_options` names."""
    found: dict[str, inspect.Parameter] = {}
    for constructor in _constructors(cls):
        for parameter in _by_name(constructor):
            found.setdefault(parameter.name, parameter)
        others = [
            p.name for p in inspect.signature(constructor).parameters.values() if p.kind is p.VAR_KEYWORD
        ]
        if "index_options" in others and hasattr(cls, "index_class"):
            return {**index_parameters(cls.index_class.options_class), **found}
        if not others:
            break
    return found


def index_parameters(options: Any) -> dict[str, inspect.Parameter]:
    """Return the fields of an options dataclass as parameters."""
    hints = types_of(options)
    return {
        each.name: inspect.Parameter(
            each.name, inspect.Parameter.KEYWORD_ONLY, default=default_of(each), annotation=hints[each.name]
        )
        for each in fields(options)
    }


def check_options(what: str, cls: type, given: Collection[str], *, besides: Collection[str] = ()) -> None:
    """Raise if ``cls`` does not accept a given option, or requires one that is missing.

    Parameters
    ----------
    what
        Owner of the options, for the message, such as ``"backend 'torch'"``.
    cls
        The class to construct.
    given
        Names of the given options.
    besides
        Parameters that are not options because the caller always gives them.

    Raises
    ------
    InvalidArgumentError
        For the first unknown or missing option.
    """
    accepted = accepted_options(cls, besides=besides)
    for name in given:
        if name not in accepted:
            raise InvalidArgumentError(
                f"There is no option {brief(name)} of {what}{did_you_mean(name, accepted) or '.'} It accepts: "
                f"{quoted(accepted)}"
            )
    for name in _needed(cls):
        if name not in given and name not in besides:
            raise InvalidArgumentError(
                f"The option {name!r} of {what} is missing. It accepts: {quoted(accepted)}"
            )


def _needed(cls: type) -> list[str]:
    # Of the outermost constructor only: it may pass what the others require.
    return [p.name for c in _constructors(cls)[:1] for p in _by_name(c) if p.default is p.empty]


def _constructors(cls: type) -> list[Callable[..., None]]:
    return [vars(owner)["__init__"] for owner in cls.__mro__[:-1] if "__init__" in vars(owner)]


def _by_name(constructor: Callable[..., None]) -> list[inspect.Parameter]:
    """Return the parameters that can be passed by name, except ``self``."""
    parameters = list(inspect.signature(constructor).parameters.values())[1:]
    return [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
