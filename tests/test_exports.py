"""What stands in a public signature is public itself."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re

import memlong

ROOMS = ("bank", "decoder", "errors", "evaluation", "plugins", "settings", "testing", "training")
OURS_ALONE = {  # between a bank, its snapshots and the decoder
    "BlockKind",
    "ChunkTable",
    "Reader",
    "SavedBank",
    "SnapshotWriter",
    "StoredBank",
    "Options",
    "Settings",
}
PASSED_ON = {
    "KvSource",
    "LatentMaps",
    "ModelLayout",
    "RandomChunks",
    "Search",
    "StreamCache",
}  # whose own parts are not for users


def public():
    modules = [memlong, *(importlib.import_module(f"memlong.{room}") for room in ROOMS)]
    return {
        name: getattr(module, name)
        for module in modules
        for name in getattr(module, "__all__", [each for each in vars(module) if not each.startswith("_")])
    }


def signatures(name, thing):
    """Annotations of a class, its constructor and its public methods, or of a function."""
    if inspect.isfunction(thing):
        yield name, thing
    if not inspect.isclass(thing) or not thing.__module__.startswith("memlong"):
        return
    yield name, thing
    for each in ("__init__", *(each for each in dir(thing) if not each.startswith("_"))):
        found = inspect.getattr_static(thing, each)
        found = found.fget if isinstance(found, property) else getattr(found, "__func__", found)
        if inspect.isfunction(found):
            yield f"{name}.{each}", found


def test_what_stands_in_a_public_signature_is_exported():
    ours = set()
    for info in pkgutil.walk_packages(memlong.__path__, "memlong."):
        if not info.name.startswith(("memlong.cli", "memlong.testing")):
            module = importlib.import_module(info.name)
            ours |= {
                each
                for each, thing in vars(module).items()
                if inspect.isclass(thing) and thing.__module__.startswith("memlong")
            }
    exported = public()
    missing = {
        (word, where)
        for name, thing in exported.items()
        if name not in PASSED_ON
        for where, each in signatures(name, thing)
        for annotation in inspect.get_annotations(each).values()
        for word in re.findall(r"[A-Z]\w+", str(annotation))
        if word in ours - exported.keys() - OURS_ALONE
    }
    assert not missing
