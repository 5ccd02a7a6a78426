"""The options a class accepts, read from its constructors, and the check of those that are given."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection

from memlong.errors import InvalidArgumentError
from memlong.plugins.names import did_you_mean, quoted


def accepted_options(cls: type, *, besides: Collection[str] = ()) -> tuple[str, ...]:
    """Return the names of the options that ``cls`` takes, its own first, then those it passes up.

    A constructor that ends in ``**options`` is taken to pass them to the next one in the MRO.

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
        if not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(constructor).parameters.values()):
            break
    return found


def check_options(what: str, cls: type, given: Collection[str], *, besides: Collection[str] = ()) -> None:
    """Raise if ``cls`` does not take an option that is given, or needs one that is not.

    Parameters
    ----------
    what
        Whose options they are, for the message, such as ``"backend 'torch'"``.
    cls
        The class to construct.
    given
        The names of the options that are given.
    besides
        Parameters that are not options because the caller always gives them.

    Raises
    ------
    InvalidArgumentError
        For the first name that does not fit.
    """
    accepted = accepted_options(cls, besides=besides)
    for name in given:
        if name not in accepted:
            raise InvalidArgumentError(
                f"{what} has no option {name!r}.{did_you_mean(name, accepted)} It accepts: {quoted(accepted)}"
            )
    for name in _needed(cls):
        if name not in given and name not in besides:
            raise InvalidArgumentError(f"{what} needs the option {name!r}. It accepts: {quoted(accepted)}")


def _needed(cls: type) -> list[str]:
    # Of the outermost constructor alone: it may itself give what those it calls need.
    return [p.name for c in _constructors(cls)[:1] for p in _by_name(c) if p.default is p.empty]


def _constructors(cls: type) -> list[Callable[..., None]]:
    return [vars(owner)["__init__"] for owner in cls.__mro__[:-1] if "__init__" in vars(owner)]


def _by_name(constructor: Callable[..., None]) -> list[inspect.Parameter]:
    """Return the parameters that can be given by name, ``self`` left out."""
    parameters = list(inspect.signature(constructor).parameters.values())[1:]
    return [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
