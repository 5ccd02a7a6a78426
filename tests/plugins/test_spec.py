"""What a plugin registers is checked at once, and whether it is installed without importing it."""

from __future__ import annotations

import itertools
import sys
import types

import pytest

from memlong.errors import InvalidArgumentError
from memlong.plugins import Spec


def spec(name="acme", target="acme.bank:Bank", **more) -> Spec:
    return Spec("backend", name, target, "plugin", **more)


@pytest.mark.parametrize("name", ["", "Acme", "a b", "-a", "a-", "a/b", "a\n", None, 3, "a" * 101])
def test_a_bad_name_is_refused(name):
    with pytest.raises(InvalidArgumentError, match=r"name of a backend must be"):
        spec(name=name)


@pytest.mark.parametrize("name", ["torch", "faiss-hnsw", "my_index.v2", "3d"])
def test_a_good_name_is_taken(name):
    assert spec(name=name).name == name


@pytest.mark.parametrize(
    "target",
    ["", "acme", "acme:", ":Bank", "acme bank:Bank", "acme:Bank:x", "a..b:Bank", "acme:Bank()", None, str],
)
def test_a_bad_target_is_refused(target):
    with pytest.raises(InvalidArgumentError, match=r"target of backend 'acme' must be 'module:Class'"):
        spec(target=target)


@pytest.mark.parametrize("requires", ["faiss", (3,), ("faiss-cpu",), ("",), 3])
def test_requirements_are_import_names(requires):
    with pytest.raises(InvalidArgumentError, match=r"requires of backend 'acme' must be a tuple"):
        spec(requires=requires)


@pytest.mark.parametrize("field", ["install", "description"])
def test_text_is_text(field):
    with pytest.raises(InvalidArgumentError, match=f"{field} of backend 'acme' must be text"):
        spec(**{field: None})


@pytest.mark.parametrize("requires", [["faiss"], iter(["faiss"])])
def test_requirements_become_a_tuple(requires):
    assert spec(requires=requires).requires == ("faiss",)


def test_requirements_without_end_are_refused():
    with pytest.raises(
        InvalidArgumentError,
        match=r"requires of backend 'acme' must be a tuple of at most 100 .*got <generator",
    ):
        spec(requires=(f"module{number}" for number in itertools.count()))


class Unprintable:
    def __repr__(self):
        raise RuntimeError


@pytest.mark.parametrize("field", ["name", "target", "requires", "install", "description"])
@pytest.mark.parametrize(
    "value",
    ["x" * 10**6, ["x"] * 10**6, Unprintable(), 10**5000],
    ids=["text", "list", "object", "number"],
)
def test_what_is_long_or_cannot_be_printed_is_told_in_brief(field, value):
    with pytest.raises(InvalidArgumentError, match=rf"^(The )?{field} of ") as caught:
        spec(**{field: value})
    assert len(str(caught.value)) < 500


def test_missing_names_what_is_not_installed_and_imports_nothing(tmp_path, monkeypatch):
    (tmp_path / "fake_bomb_library.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    needs = spec(requires=("fake_bomb_library", "no_such_library", "no_such_parent.child"))
    assert needs.missing() == ("no_such_library", "no_such_parent.child")
    assert "fake_bomb_library" not in sys.modules


def test_a_module_that_was_put_in_place_by_hand_is_not_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "made_by_hand", types.ModuleType("made_by_hand"))
    assert spec(requires=("made_by_hand",)).missing() == ()


def test_a_module_whose_import_is_blocked_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "json", None)
    assert spec(requires=("json",)).missing() == ("json",)
