"""A manager takes plugins as objects too, and keeps apart what belongs to whom."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from memlong.errors import InvalidArgumentError, PluginError
from memlong.plugins import PluginManager, Registry, hookimpl


def plugin(*backends: str) -> object:
    class Plugin:
        @hookimpl
        def memlong_register_backends(self, register):
            for name in backends:
                register(name, "acme:Bank")

    return Plugin()


@pytest.fixture
def manager(site) -> PluginManager:
    return PluginManager()


def test_an_object_can_be_registered(manager):
    report = manager.register(plugin("a", "b"), name="mine")
    assert (report.status, report.origin, report.backends) == ("loaded", "registered in code", ("a", "b"))
    assert report.module == __name__
    assert report in manager.reports
    assert Registry(manager).backend("b").plugin == "mine"


def test_a_registry_sees_what_is_registered_later(manager):
    registry = Registry(manager)
    manager.register(plugin("late"), name="mine")
    assert registry.backend("late").target == "acme:Bank"


def test_managers_share_nothing(manager):
    manager.register(plugin("mine"), name="mine")
    assert "mine" not in [spec.name for spec in PluginManager().specs("backend")]


def test_an_object_that_fails_raises_and_leaves_no_trace(manager):
    class Plugin:
        @hookimpl
        def memlong_register_backends(self, register):
            register("half", "half:Half")
            raise LookupError("no second")

    before = manager.reports
    with pytest.raises(PluginError, match=r"plugin 'mine' failed: LookupError: no second") as caught:
        manager.register(Plugin(), name="mine")
    assert isinstance(caught.value.__cause__, LookupError)
    assert manager.reports == before
    assert "half" not in [spec.name for spec in manager.specs("backend")]
    manager.register(plugin("half"), name="mine")


def test_a_name_is_taken_once(manager):
    manager.register(plugin("a"), name="mine")
    with pytest.raises(PluginError, match="there is already a plugin named"):
        manager.register(plugin("b"), name="Mine")


@pytest.mark.parametrize("name", [None, 3, "", " ", "x" * 201])
def test_a_plugin_needs_a_name(manager, name):
    with pytest.raises(
        InvalidArgumentError, match="name must be non-empty text of at most 200 characters, got "
    ):
        manager.register(plugin("a"), name=name)


def test_the_same_object_is_taken_once(manager):
    same = plugin("a")
    manager.register(same, name="mine")
    with pytest.raises(PluginError, match="already loaded under another name"):
        manager.register(same, name="other")
    assert Registry(manager).backend("a").plugin == "mine"


def test_an_object_without_hooks_is_refused(manager):
    with pytest.raises(PluginError, match="implements no memlong hook"):
        manager.register(SimpleNamespace(), name="mine")


def test_a_hook_with_another_signature_is_refused(manager):
    class Plugin:
        @hookimpl
        def memlong_register_backends(self, registry):
            """Take what nobody gives."""

    with pytest.raises(PluginError, match=r"wrong signature: .*\{'registry'\} are declared") as caught:
        manager.register(Plugin(), name="mine")
    assert "\n" not in str(caught.value)
    assert manager.specs("backend") == PluginManager().specs("backend")


def test_the_environment_can_disable_an_object(site):
    manager = PluginManager(environ={"MEMLONG_DISABLE_PLUGINS": "mine"})
    assert manager.register(plugin("a"), name="mine").status == "disabled"
    assert "missing" not in {report.status for report in manager.reports}


def test_a_selection_is_about_third_parties_only(site):
    manager = PluginManager(environ={"MEMLONG_PLUGINS": ""})
    assert manager.register(plugin("a"), name="mine").status == "loaded"


def test_register_is_of_no_use_after_the_hook(manager):
    kept = []

    class Plugin:
        @hookimpl
        def memlong_register_backends(self, register):
            register("a", "acme:Bank")
            kept.append(register)

    manager.register(Plugin(), name="mine")
    with pytest.raises(PluginError, match="not after the hook has returned"):
        kept[0]("b", "acme:Bank")
