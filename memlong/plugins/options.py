"""The options a class accepts, read from its constructors, and the check of those that are given."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable

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
    names: dict[str, None] = {}
    for owner in cls.__mro__:
        constructor = vars(owner).get("__init__")
        if constructor is None or owner is object:
            continue
        parameters = list(inspect.signature(constructor).parameters.values())[1:]
        names.update(
            (p.name, None) for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        )
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return tuple(name for name in names if name not in besides)


def check_options(what: str, given: Iterable[str], accepted: Collection[str]) -> None:
    """Raise if an option that is given is not accepted.

    Parameters
    ----------
    what
        Whose options they are, for the message, such as ``"backend 'torch'"``.
    given
        The names that are given.
    accepted
        The names that are known.

    Raises
    ------
    InvalidArgumentError
        For the first unknown name.
    """
    for name in given:
        if name not in accepted:
            raise InvalidArgumentError(
                f"{what} has no option {name!r}.{did_you_mean(name, accepted)} It accepts: {quoted(accepted)}"
            )
