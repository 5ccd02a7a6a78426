"""Finding plugins: the built-in ones and the entry points of installed distributions."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from memlong.errors import PluginError
from memlong.plugins.names import cut, normalise

ENTRY_POINT_GROUP = "memlong"
BUILT_IN = "built-in"
IN_CODE = "registered in code"

_MOST_PLUGINS, _LONGEST = 100, 200  # of one distribution; of a name that messages and tables call it by

# Named as text: importing any of them here would turn the import rules upside down.
_BUILT_IN_MODULES = {
    "memlong_torch": "memlong_torch",
    "memlong_faiss": "memlong_faiss",
    "memlong_hnswlib": "memlong_hnswlib",
    "memlong_retrievers": "memlong.decoder.retrievers",
    "memlong_eviction": "memlong.plugins.policies",
}


@dataclass(frozen=True)
class Candidate:
    """A plugin that was found and is not yet imported.

    Parameters
    ----------
    name
        The name it goes by.
    origin
        Where it comes from, in words.
    module
        The module, or ``module:attribute``, that holds its hooks.
    load
        Imports it and returns the object with the hooks; raises whatever the plugin raises.
    distribution
        The name of the distribution that brought it; empty for a built-in.
    """

    name: str
    origin: str
    module: str
    load: Callable[[], object]
    distribution: str = ""

    @property
    def is_third_party(self) -> bool:
        """Whether an installed distribution brings it."""
        return self.origin not in (BUILT_IN, IN_CODE)

    def answers_to(self, name: str) -> bool:
        """Whether ``name`` means this plugin: its own name or its distribution's."""
        return normalise(name) in {normalise(self.name), normalise(self.distribution)} - {""}


def built_ins() -> Iterator[Candidate]:
    """Yield memlong's own plugins."""
    for name, module in _BUILT_IN_MODULES.items():
        yield Candidate(name, BUILT_IN, module, _importer(module))


def _importer(module: str) -> Callable[[], object]:
    return lambda: importlib.import_module(module)


def third_parties() -> Iterator[Candidate]:
    """Yield the plugins of installed distributions, in order of name.

    A distribution whose ``entry_points.txt`` cannot be read is yielded as a candidate that raises the
    reason when it is loaded, so that one broken installation hides no other plugin.
    """
    found: list[Candidate] = []
    for distribution in importlib.metadata.distributions():
        if not _may_hold_plugins(distribution):
            continue
        label, version = _name_and_version(distribution)
        if not _is_shadowed(distribution, label):
            found.extend(_candidates(distribution, cut(label, _LONGEST), _origin(label, version)))
    yield from sorted(found, key=lambda candidate: (candidate.name, candidate.distribution))


def _may_hold_plugins(distribution: importlib.metadata.Distribution) -> bool:
    """Whether its entry points speak of memlong, or cannot be read; to parse those of all others takes long."""
    try:
        return ENTRY_POINT_GROUP in (distribution.read_text("entry_points.txt") or "")
    except Exception:  # noqa: BLE001 - whatever a broken file raises is reported where it is parsed
        return True


def _is_shadowed(distribution: importlib.metadata.Distribution, label: str) -> bool:
    """Whether another distribution of that name comes first on the path: its modules are the ones to be imported."""
    if not label:
        return False
    # What is left of a removed one has no name, and shadows nothing.
    named = (each for each in importlib.metadata.distributions(name=label) if _name_and_version(each)[0])
    return _identity(next(named, distribution)) != _identity(distribution)


def _identity(distribution: importlib.metadata.Distribution) -> tuple[str, str, str]:
    return (str(distribution.locate_file("")), *_name_and_version(distribution))


def _name_and_version(distribution: importlib.metadata.Distribution) -> tuple[str, str]:
    try:
        metadata = distribution.metadata
        # From Python 3.12 on it is deprecated to ask for a key that is not there.
        name, version = ((metadata.get_all(key) or [""])[0] for key in ("Name", "Version"))
        return name or "", version or ""
    except Exception:  # noqa: BLE001 - half removed, no METADATA is left, or it is no text
        return "", ""


def _origin(label: str, version: str) -> str:
    return f"{cut(label, _LONGEST) or 'an unnamed distribution'} {cut(version, _LONGEST)}".strip()


def _candidates(
    distribution: importlib.metadata.Distribution, label: str, origin: str
) -> Iterator[Candidate]:
    try:
        entry_points = [point for point in distribution.entry_points if point.group == ENTRY_POINT_GROUP]
    except Exception as error:  # noqa: BLE001 - whatever a broken file raises is that plugin's report
        yield Candidate(label, origin, "entry_points.txt", _raiser(error), label)
        return
    if len(entry_points) > _MOST_PLUGINS:
        many = PluginError(f"it names {len(entry_points):,} plugins, of at most {_MOST_PLUGINS}")
        yield Candidate(label, origin, "entry_points.txt", _raiser(many), label)
        return
    for point in entry_points:
        yield Candidate(cut(point.name, _LONGEST), origin, cut(point.value, _LONGEST), point.load, label)


def _raiser(error: Exception) -> Callable[[], object]:
    def raise_it() -> object:
        raise error

    return raise_it
