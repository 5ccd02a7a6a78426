"""Two environment variables say which plugins are loaded."""

from __future__ import annotations

import pytest

from memlong.plugins import PluginManager


@pytest.fixture
def three(install_good):
    for name in ("acme", "beta", "zeta"):
        install_good(name)


def loaded(**environ: str) -> set[str]:
    reports = PluginManager(environ=environ).reports
    return {report.name for report in reports if report.status == "loaded"} & {
        "acme",
        "beta",
        "zeta",
        "memlong_torch",
        "memlong_faiss",
    }


BUILT_IN = {"memlong_torch", "memlong_faiss"}


def test_without_variables_everything_is_loaded(three):
    assert loaded() == BUILT_IN | {"acme", "beta", "zeta"}


def test_an_empty_selection_leaves_the_built_ins(three):
    assert loaded(MEMLONG_PLUGINS="") == BUILT_IN


def test_a_selection_loads_these_by_plugin_or_distribution_name(three):
    assert loaded(MEMLONG_PLUGINS="acme, Zeta_Memory ,") == BUILT_IN | {"acme", "zeta"}


def test_any_plugin_can_be_disabled(three):
    assert loaded(MEMLONG_DISABLE_PLUGINS="memlong-faiss,beta") == {"memlong_torch", "acme", "zeta"}


def test_disabling_beats_selecting(three):
    assert loaded(MEMLONG_PLUGINS="acme,beta", MEMLONG_DISABLE_PLUGINS="acme") == BUILT_IN | {"beta"}


def test_the_variables_are_read_when_the_manager_is_made(three, monkeypatch):
    monkeypatch.setenv("MEMLONG_PLUGINS", "acme")
    manager = PluginManager()
    monkeypatch.setenv("MEMLONG_PLUGINS", "")
    assert "acme" in {report.name for report in manager.reports if report.status == "loaded"}


def test_what_is_not_loaded_is_reported_with_the_variable(three):
    environ = {"MEMLONG_PLUGINS": "acme", "MEMLONG_DISABLE_PLUGINS": "memlong_faiss"}
    reports = {report.name: report for report in PluginManager(environ=environ).reports}
    assert (reports["beta"].status, reports["beta"].reason) == (
        "disabled",
        "not in MEMLONG_PLUGINS='acme'",
    )
    assert reports["memlong_faiss"].status == "disabled"
    assert reports["memlong_faiss"].reason == "disabled by MEMLONG_DISABLE_PLUGINS='memlong_faiss'"


def test_a_disabled_plugin_is_not_even_imported(install):
    install("bomb-memory", entry="bomb", module="fake_bomb", source="raise KeyboardInterrupt")
    PluginManager(environ={"MEMLONG_DISABLE_PLUGINS": "bomb"})


@pytest.mark.parametrize("variable", ["MEMLONG_PLUGINS", "MEMLONG_DISABLE_PLUGINS"])
def test_a_name_that_matches_nothing_is_reported(three, variable):
    reports = PluginManager(environ={variable: "acmee"}).reports
    (report,) = [report for report in reports if report.status == "missing"]
    assert (report.name, report.origin) == ("acmee", variable)
    assert report.reason == (f"{variable} names it, but no such plugin is installed. Did you mean 'acme'?")


def test_the_name_of_a_backend_leads_to_its_plugin(site):
    reports = PluginManager(environ={"MEMLONG_DISABLE_PLUGINS": "faiss"}).reports
    (report,) = [report for report in reports if report.status == "missing"]
    assert report.reason.endswith("Did you mean 'memlong_faiss'?")
