"""Settings, each declared once: default, bounds and meaning stand at its field, and all else follows from there."""

from __future__ import annotations

import operator
import textwrap
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import cache
from math import isfinite
from numbers import Real
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from memlong.errors import InvalidArgumentError

__all__ = ["Setting", "documented", "setting"]

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class Setting:
    """What is known of a setting besides its name, type and default.

    Attributes
    ----------
    help
        What it does, in a sentence or two.
    more
        What else there is to know; not shown on the command line.
    least, above, most
        Bounds of a number: the first and the last are allowed, ``above`` is not.
    unset
        What leaving it out means, where the default is None or empty.
    metavar
        What stands for its value on the command line.
    example
        Of a mapping: a good ``K=V``.
    texts
        Of a mapping: keys whose values are text, whatever they look like.
    needs_backend
        Whether it says nothing without a memory backend.
    is_saved
        Whether a snapshot holds it: never an address, a credential, a place to write to, or code.
    most_of_strangers
        The most that a file may ask for, which may be a stranger's; by default ``most``. Infinity where no number does
        harm.
    """

    help: str
    more: str = ""
    least: float | None = None
    above: float | None = None
    most: float | None = None
    unset: str | None = None
    metavar: str | None = None
    example: str = "index=HNSW32"
    texts: frozenset[str] = frozenset()
    needs_backend: bool = False
    is_saved: bool = True
    most_of_strangers: float | None = None


def setting(default: Any, help: str, **more: Any) -> Any:  # noqa: A002 - as argparse and typer have it
    """Declare a field of a settings dataclass; ``more`` are other attributes of a `Setting`.

    A default of ``dict`` is an empty one of its own.
    """
    said = {"setting": Setting(help, **more)}
    if default is dict:
        return field(default_factory=dict, metadata=said)
    return field(default=default, metadata=said)


def told(each: Field[Any]) -> Setting:
    """Return what is known of a field that `setting` declared."""
    found: Setting = each.metadata["setting"]
    return found


def default_of(each: Field[Any]) -> Any:
    """Return what a field is where nobody sets it."""
    return each.default if each.default_factory is MISSING else each.default_factory()


@cache
def types_of(settings: Any) -> dict[str, Any]:
    """Return the type of each field of a settings dataclass."""
    return get_type_hints(settings)


def documented(settings: type[Settings]) -> type[Settings]:
    """Write the parameters of a settings dataclass into its docstring, from its fields."""
    lines = ["", "", "    Parameters", "    ----------"]
    for each in fields(settings):  # type: ignore[arg-type]
        said = told(each)
        unset = f" By default, {said.unset}." if said.unset else ""
        text = f"{said.help}{unset} {said.more}"
        lines += [
            f"    {each.name}",
            textwrap.fill(text.strip(), 112, initial_indent=" " * 8, subsequent_indent=" " * 8),
        ]
    head, raises, tail = (settings.__doc__ or "").partition("\n\n    Raises")
    settings.__doc__ = head + "\n".join(lines) + (f"\n\n    Raises{tail}" if raises else "")
    return settings


def checked(settings: Any) -> dict[str, Any]:
    """Return the values of a settings object by name, numbers as Python's own.

    Raises
    ------
    InvalidArgumentError
        Naming the first that cannot be used, the value and what it must be.
    """
    kind: Any = type(settings)
    hints, found = types_of(kind), {}
    for each in fields(settings):
        value, said = getattr(settings, each.name), told(each)
        kinds, optional = _kinds(hints[each.name])
        good = next((kind for kind in kinds if _is(kind, value, said)), None)
        if good is None and not (value is None and optional):
            wanted = " or ".join(dict.fromkeys(_wanted(kind, value, said) for kind in kinds))
            # A mapping may hold what is secret.
            got = (
                f"a {type(value).__name__}"
                if Mapping in map(_plain, kinds) and said.metavar
                else shown_value(value)
            )
            raise InvalidArgumentError(
                f"{each.name} must be {wanted}{', or None' if optional else ''}, got {got}."
            )
        found[each.name] = _own(good, value)
    return found


def _own(kind: Any, value: Any) -> Any:
    """Return a value as Python's own, and a container as nobody else's."""
    plain = _plain(kind)
    if plain is int:
        return operator.index(value)
    if plain is float:
        return value if type(value) in (int, float) else float(value)
    return {tuple: tuple, Mapping: dict}.get(plain, lambda same: same)(value)


def shown_value(value: object) -> str:
    """Return a value for a message."""
    try:
        return repr(value)
    except ValueError:  # it has more digits than Python prints
        return "a number of thousands of digits"


def _kinds(hint: Any) -> tuple[tuple[Any, ...], bool]:
    """Return what a value may be, and whether it may be None."""
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return tuple(each for each in parts if each is not type(None)), type(None) in parts


def _plain(kind: Any) -> Any:
    return get_origin(kind) or kind


def _is(kind: Any, value: object, said: Setting) -> bool:
    plain = _plain(kind)
    if plain is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if plain is bool:
        return isinstance(value, bool)
    if plain is int:
        try:
            return not isinstance(value, bool) and _is_within(operator.index(value), said)  # type: ignore[arg-type]
        except TypeError:
            return False
    if plain is float:
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        # First the bounds: a very long integer is no float.
        return is_number and _is_within(value, said) and isfinite(value)  # type: ignore[arg-type]
    if issubclass(plain, Sequence) and plain is not str:
        return isinstance(value, list | tuple) and all(isinstance(each, get_args(kind)[0]) for each in value)
    return isinstance(value, plain)


def _is_within(value: float, said: Setting) -> bool:
    return (
        (said.least is None or value >= said.least)
        and (said.above is None or value > said.above)
        and value <= (_most(value) if said.most is None else said.most)
    )


def _most(value: object) -> float:
    """Return a bound that every number has: what 64 bits hold, and what float32 does."""
    return 2**63 - 1 if isinstance(value, int) else 1e30


def _wanted(kind: Any, value: object, said: Setting) -> str:
    plain = _plain(kind)
    if plain is Literal:
        return f"one of {', '.join(map(repr, get_args(kind)))}"
    if plain in (int, float):
        noun = "an integer" if plain is int else "a number"
        if said.most is not None and said.least is not None:
            return f"{noun} from {said.least} to {said.most}"
        if said.least is not None:
            noun += f" of at least {said.least}"
        elif said.above is not None:
            noun += f" above {said.above}"
        if said.most is not None:
            return f"{noun} and at most {said.most}"
        is_too_large = isinstance(value, int | float) and value > _most(value)
        return f"{noun} and at most {_most(value)}" if is_too_large else noun
    if issubclass(plain, Sequence) and plain is not str:
        return "a sequence of names" if get_args(kind)[0] is str else "a list of integers"
    words = {str: "text", bool: "True or False", Mapping: "a mapping from option to value"}
    return words[plain]
