"""Plugin discovery: built-in plugins, and entry points of installed distributions."""

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

LONGEST = 200
"""Maximum length of the name of a plugin or distribution."""

_MOST_PLUGINS = 100  # per distribution

# As strings: importing them here would violate the import rules.
_BUILT_IN_MODULES = {
    "memlong_torch": "memlong_torch",
    "memlong_faiss": "memlong_faiss",
    "memlong_hnswlib": "memlong_hnswlib",
    "memlong_retrievers": "memlong.decoder.retrievers",
    "memlong_eviction": "memlong.plugins.policies",
}


@dataclass(frozen=True)
class Candidate:
    """A plugin that was found but not imported.

    Parameters
    ----------
    name
        The plugin's name.
    origin
        Where it comes from, for messages.
    module
        The module, or ``module:attribute``, with its hooks.
    load
        Imports the plugin and returns the object with the hooks; raises whatever the plugin raises.
    distribution
        Name of its distribution; empty for a built-in plugin.
    """

    name: str
    origin: str
    module: str
    load: Callable[[], object]
    distribution: str = ""

    @property
    def is_third_party(self) -> bool:
        """Whether it comes from an installed distribution."""
        return self.origin not in (BUILT_IN, IN_CODE)

    def answers_to(self, name: str) -> bool:
        """Return whether ``name`` is this plugin's name or its distribution's."""
        return normalise(name) in {normalise(self.name), normalise(self.distribution)} - {""}


def built_ins() -> Iterator[Candidate]:
    """Yield the built-in plugins."""
    for name, module in _BUILT_IN_MODULES.items():
        yield Candidate(name, BUILT_IN, module, _importer(module))


def _importer(module: str) -> Callable[[], object]:
    return lambda: importlib.import_module(module)


def third_parties() -> Iterator[Candidate]:
    """Yield the plugins of installed distributions, sorted by name.

    A distribution whose ``entry_points.txt`` cannot be read becomes a candidate that raises the reason when loaded, so
    that one broken installation does not hide other plugins.
    """
    found: list[Candidate] = []
    for distribution in importlib.metadata.distributions():
        if not _may_hold_plugins(distribution):
            continue
        label, version = _name_and_version(distribution)
        if not _is_shadowed(distribution, label):
            found.extend(_candidates(distribution, cut(label, LONGEST), _origin(label, version)))
    yield from sorted(found, key=lambda candidate: (candidate.name, candidate.distribution))


def _may_hold_plugins(distribution: importlib.metadata.Distribution) -> bool:
    """Return whether its entry points mention memlong, or cannot be read; parsing all of them would be slow."""
    try:
        return ENTRY_POINT_GROUP in (distribution.read_text("entry_points.txt") or "")
    except Exception:  # noqa: BLE001 - a broken file is reported where it is parsed
        return True


def _is_shadowed(distribution: importlib.metadata.Distribution, label: str) -> bool:
    """Return whether another distribution of this name comes earlier on the path and is imported instead."""
    if not label:
        return False
    # Leftovers of an uninstalled distribution have no name, and shadow nothing.
    named = (each for each in importlib.metadata.distributions(name=label) if _name_and_version(each)[0])
    return _identity(next(named, distribution)) != _identity(distribution)


def _identity(distribution: importlib.metadata.Distribution) -> tuple[str, str, str]:
    return (str(distribution.locate_file("")), *_name_and_version(distribution))


def _name_and_version(distribution: importlib.metadata.Distribution) -> tuple[str, str]:
    try:
        metadata = distribution.metadata
        # metadata[key] of a missing key is deprecated since Python 3.12.
        name, version = ((metadata.get_all(key) or [""])[0] for key in ("Name", "Version"))
        return name or "", version or ""
    except Exception:  # noqa: BLE001 - METADATA is missing (partly uninstalled) or not text
        return "", ""


def _origin(label: str, version: str) -> str:
    return f"{cut(label, LONGEST) or 'an unnamed distribution'} {cut(version, LONGEST)}".strip()


def _candidates(
    distribution: importlib.metadata.Distribution, label: str, origin: str
) -> Iterator[Candidate]:
    try:
        entry_points = [point for point in distribution.entry_points if point.group == ENTRY_POINT_GROUP]
    except Exception as error:  # noqa: BLE001 - any error is reported for this plugin
        yield Candidate(label, origin, "entry_points.txt", _raiser(error), label)
        return
    if len(entry_points) > _MOST_PLUGINS:
        many = PluginError(
            f"its entry points must name at most {_MOST_PLUGINS} plugins, got {len(entry_points):,}"
        )
        yield Candidate(label, origin, "entry_points.txt", _raiser(many), label)
        return
    for point in entry_points:
        yield Candidate(cut(point.name, LONGEST), origin, cut(point.value, LONGEST), point.load, label)


def _raiser(error: Exception) -> Callable[[], object]:
    def raise_it() -> object:
        raise error

    return raise_it
