"""Settings, each declared once: validation, CLI options, JSON and docs all derive from its dataclass field."""

from __future__ import annotations

import json
import operator
import textwrap
import types
from collections.abc import Container, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, Field, dataclass, field, fields
from difflib import get_close_matches
from functools import cache, wraps
from math import isfinite
from numbers import Real
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from memlong.errors import InvalidArgumentError

__all__ = ["Setting", "documented", "setting"]

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class Setting:
    """The metadata of a setting, besides its name, type and default.

    Attributes
    ----------
    help
        What it does, in a sentence or two.
    more
        Further details, left out of the command-line help.
    least, above, most
        Bounds of a number: ``least`` and ``most`` are inclusive, ``above`` is exclusive.
    unset
        What an unset value means, where the default is None or empty.
    metavar
        Placeholder for its value in the command-line help.
    example
        For a mapping: a valid ``K=V``.
    texts
        For a mapping: keys whose values are always text, even if they look like numbers.
    needs_backend
        Whether it has no effect without a memory backend.
    is_saved
        Whether it is saved in snapshots; must be False for an address, a credential, an output path, or code.
    most_of_strangers
        Upper bound for values read from a file, which may be untrusted; ``most`` by default. Infinity if any number
        is harmless.
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


def setting(default: Any, help: str, **more: Any) -> Any:  # noqa: A002 - as in argparse and typer
    """Declare a field of a settings dataclass; ``more`` sets further attributes of its `Setting`.

    A default of ``dict`` gives each instance its own empty dictionary.
    """
    metadata = {"setting": Setting(help, **more)}
    if default is dict:
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


def metadata_of(each: Field[Any]) -> Setting:
    """Return the metadata of a field declared with `setting`."""
    metadata: Setting = each.metadata["setting"]
    return metadata


def default_of(each: Field[Any]) -> Any:
    """Return the default of a field."""
    return each.default if each.default_factory is MISSING else each.default_factory()


@cache
def types_of(settings: Any) -> dict[str, Any]:
    """Return the type of each field of a settings dataclass, by name."""
    return get_type_hints(settings)


def documented(settings: type[Settings]) -> type[Settings]:
    """Complete a settings dataclass: a docstring with its Parameters, and an error that helps with unknown ones."""
    _refuse_unknown(settings)
    lines = ["", "", "    Parameters", "    ----------"]
    for each in fields(settings):  # type: ignore[arg-type]
        metadata = metadata_of(each)
        unset = f" By default, {metadata.unset}." if metadata.unset else ""
        text = f"{metadata.help}{unset} {metadata.more}"
        lines += [
            f"    {each.name}",
            textwrap.fill(text.strip(), 112, initial_indent=" " * 8, subsequent_indent=" " * 8),
        ]
    head, raises, tail = (settings.__doc__ or "").partition("\n\n    Raises")
    settings.__doc__ = head + "\n".join(lines) + (f"\n\n    Raises{tail}" if raises else "")
    return settings


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` with the known name that is closest, or an empty string if none is close."""
    close = get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def key_values(
    option: str, given: Iterable[str], *, example: str = "index=HNSW32", as_text: Container[str] = ()
) -> dict[str, object]:
    """Parse ``K=V`` strings into a dictionary; values are parsed as JSON where possible, and stay text otherwise.

    Parameters
    ----------
    option
        The option's name, for error messages.
    given
        The strings given on the command line.
    example
        A valid value, for error messages.
    as_text
        Keys whose values always stay text.

    Raises
    ------
    InvalidArgumentError
        If a string has no ``=``, or a key is given twice.
    """
    found: dict[str, object] = {}
    for text in given:
        key, equals, value = text.partition("=")
        owner, dot, own = key.strip().rpartition(".")  # hyphens are part of an owner's name
        key = owner + dot + own.replace("-", "_")
        if not equals or not key:
            raise InvalidArgumentError(f"{option} must be K=V, such as {option} {example}, got {text!r}")
        if key in found:
            raise InvalidArgumentError(f"{option} must give each key once, got {key!r} twice")
        found[key] = value
        if key not in as_text:
            with suppress(ValueError, RecursionError):  # too many digits, or too deeply nested
                found[key] = json.loads(value)
    return found


def _refuse_unknown(settings: Any) -> None:
    """Have the constructor name the settings that exist where it is given another."""
    construct, names = settings.__init__, [each.name for each in fields(settings)]

    @wraps(construct)
    def construct_of_known(self: Any, *values: Any, **given: Any) -> None:
        for name in given:
            if name not in names:
                raise InvalidArgumentError(
                    f"{settings.__name__} has no setting {name!r}{nearest(name, names)}; it has: {', '.join(names)}"
                )
        construct(self, *values, **given)

    settings.__init__ = construct_of_known


def checked(settings: Any) -> dict[str, Any]:
    """Validate a settings object and return its values by name, with numbers converted to Python's own types.

    Raises
    ------
    InvalidArgumentError
        If a setting is invalid; the message names the first one, its value and what it must be.
    """
    kind: Any = type(settings)
    hints, found = types_of(kind), {}
    for each in fields(settings):
        value, metadata = getattr(settings, each.name), metadata_of(each)
        kinds, optional = _kinds(hints[each.name])
        good = next((kind for kind in kinds if _is(kind, value, metadata)), None)
        if good is None and not (value is None and optional):
            wanted = " or ".join(dict.fromkeys(_wanted(kind, value, metadata) for kind in kinds))
            # A mapping may hold secrets.
            got = (
                f"a {type(value).__name__}"
                if Mapping in map(_plain, kinds) and metadata.metavar
                else repr_of(value)
            )
            raise InvalidArgumentError(
                f"{each.name} must be {wanted}{', or None' if optional else ''}, got {got}"
            )
        found[each.name] = _own(good, value)
    return found


def _own(kind: Any, value: Any) -> Any:
    """Convert a number to Python's own type and copy a container."""
    plain = _plain(kind)
    if plain is int:
        return operator.index(value)
    if plain is float:
        return value if type(value) in (int, float) else float(value)
    return {tuple: tuple, Mapping: dict}.get(plain, lambda same: same)(value)


def repr_of(value: object) -> str:
    """Return the repr of a value for a message."""
    try:
        return repr(value)
    except ValueError:  # an int with more digits than Python prints
        return "a number with thousands of digits"


def _kinds(hint: Any) -> tuple[tuple[Any, ...], bool]:
    """Return the types that a hint allows, and whether it allows None."""
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return tuple(each for each in parts if each is not type(None)), type(None) in parts


def _plain(kind: Any) -> Any:
    plain = get_origin(kind) or kind
    return Mapping if plain is dict else plain


def _is(kind: Any, value: object, metadata: Setting) -> bool:
    plain = _plain(kind)
    if plain is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if plain is bool:
        return isinstance(value, bool)
    if plain is int:
        try:
            return not isinstance(value, bool) and _is_within(operator.index(value), metadata)  # type: ignore[arg-type]
        except TypeError:
            return False
    if plain is float:
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        # Check the bounds first: a very long integer cannot be converted to float.
        return is_number and _is_within(value, metadata) and isfinite(value)  # type: ignore[arg-type]
    if issubclass(plain, Sequence) and plain is not str:
        return isinstance(value, list | tuple) and all(isinstance(each, get_args(kind)[0]) for each in value)
    return isinstance(value, plain)


def _is_within(value: float, metadata: Setting) -> bool:
    return (
        (metadata.least is None or value >= metadata.least)
        and (metadata.above is None or value > metadata.above)
        and value <= (_most(value) if metadata.most is None else metadata.most)
    )


def _most(value: object) -> float:
    """Return the upper bound of any number: 64 bits for an integer, the range of float32 for a float."""
    return 2**63 - 1 if isinstance(value, int) else 1e30


def _wanted(kind: Any, value: object, metadata: Setting) -> str:
    plain = _plain(kind)
    if plain is Literal:
        return f"one of {', '.join(map(repr, get_args(kind)))}"
    if plain in (int, float):
        noun = "an integer" if plain is int else "a number"
        if metadata.most is not None and metadata.least is not None:
            return f"{noun} from {metadata.least} to {metadata.most}"
        if metadata.least is not None:
            noun += f" of at least {metadata.least}"
        elif metadata.above is not None:
            noun += f" above {metadata.above}"
        if metadata.most is not None:
            return f"{noun} and at most {metadata.most}"
        is_too_large = isinstance(value, int | float) and value > _most(value)
        return f"{noun} and at most {_most(value)}" if is_too_large else noun
    if issubclass(plain, Sequence) and plain is not str:
        return "a sequence of names" if get_args(kind)[0] is str else "a list of integers"
    words = {str: "text", bool: "True or False", Mapping: "a mapping from option to value"}
    return words[plain]
