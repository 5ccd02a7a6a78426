"""Plugins are found among installed distributions, one by one, and one bad one never hides another."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from memlong.plugins import PluginManager, PluginReport

BUILT_INS = ("memlong_torch", "memlong_faiss", "memlong_hnswlib", "memlong_retrievers")


def report_of(manager: PluginManager, name: str) -> PluginReport:
    (report,) = [report for report in manager.reports if report.name == name]
    return report


def backend_names(manager: PluginManager) -> list[str]:
    return [spec.name for spec in manager.specs("backend")]


def test_built_ins_load_through_the_hook(site):
    reports = {report.name: report for report in PluginManager().reports}
    for name in BUILT_INS:
        assert (reports[name].status, reports[name].origin) == ("loaded", "built-in")
    assert {"torch", "faiss", "hnswlib"} <= set(backend_names(PluginManager()))
    assert {"sentence-transformers", "lm", "random", "recent"} <= set(
        reports["memlong_retrievers"].retrievers
    )


def test_a_good_plugin_is_loaded_and_says_where_it_comes_from(install_good):
    install_good("acme")
    manager = PluginManager()
    assert report_of(manager, "acme") == PluginReport(
        name="acme",
        origin="acme-memory 1.0",
        module="fake_acme_memory",
        status="loaded",
        distribution="acme-memory",
        backends=("acme",),
    )
    assert "acme" in backend_names(manager)


def test_an_object_can_be_an_entry_point(install):
    source = (
        "from memlong.plugins.hookspecs import hookimpl\n"
        "class Plugin:\n"
        "    @hookimpl\n"
        "    def memlong_register_retrievers(self, register):\n"
        "        register('acme-words', 'acme:Words')\n"
        "plugin = Plugin()\n"
    )
    info = install("acme-memory", entry="acme", module="fake_acme_object", source=source)
    (info / "entry_points.txt").write_text("[memlong]\nacme = fake_acme_object:plugin\n")
    assert report_of(PluginManager(), "acme").retrievers == ("acme-words",)


def hook(*body: str, name: str = "memlong_register_backends", argument: str = "register") -> str:
    """The source of a module that implements one hook."""
    marker = "from memlong.plugins.hookspecs import hookimpl\n@hookimpl\n"
    return f"{marker}def {name}({argument}):\n" + "".join(f"    {line}\n" for line in body)


HALF = "register('half', 'half:Half')"

BROKEN = {
    "import": ("raise RuntimeError('no licence key')", "RuntimeError: no licence key"),
    "missing library": ("import no_such_library_at_all", "No module named 'no_such_library_at_all'"),
    "exit at import": ("raise SystemExit('bye')", "SystemExit: bye"),
    "no exception": ("class Odd(BaseException): pass\nraise Odd('panic')", "Odd: panic"),
    "exception without a text": (
        "class Odd(Exception):\n    def __str__(self): raise ValueError\n    __repr__ = __str__\nraise Odd",
        "Odd: (it cannot be printed: its text raises ValueError)",
    ),
    "exception whose text ends the program": (
        "class Odd(BaseException):\n    def __str__(self): raise SystemExit\nraise Odd",
        "its text raises SystemExit",
    ),
    "a book": ("raise ValueError('x' * 10**6)", "xxx… and 998,000 more characters"),
    "syntax": ("def (", "SyntaxError"),
    "hook": (hook(HALF, "raise KeyError('second')"), "KeyError: 'second'"),
    "bad argument": (hook("register('half', 'half.Half')"), "must be 'module:Class'"),
    "twice": (hook(HALF, HALF), "registers the backend 'half' twice"),
    "exit in the hook": (hook(HALF, "raise SystemExit"), "SystemExit"),
    "names without end": (
        hook(HALF, "for i in __import__('itertools').count():", "    register(f'n{i}', 'a:B')"),
        "it must register at most 1,000 names",
    ),
    "too many names, whatever it is told": (
        hook(
            HALF, "for i in range(3000):", "    try: register(f'n{i}', 'a:B')", "    except Exception: pass"
        ),
        "it must register at most 1,000 names",
    ),
    "requires without end": (
        hook(HALF, "register('b', 'a:B', requires=(f'm{i}' for i in __import__('itertools').count()))"),
        "must be a tuple of at most 100 import names",
    ),
    "a huge name": (hook(HALF, "register('x' * 10**7, 'a:B')"), "at most 100 lowercase letters"),
    "no name": (hook(HALF, "register(object(), 'a:B')"), "got <object object at"),
    "misspelt hook": (
        hook(HALF, name="memlong_register_backend"),
        "unknown hook, 'memlong_register_backend'. Did you mean 'memlong_register_backends'?",
    ),
    "misspelt beside a good one": (
        hook(HALF) + hook("pass", name="memlong_register_retriever"),
        "unknown hook, 'memlong_register_retriever'",
    ),
    "misspelt argument": (hook("pass", argument="registry"), "registry"),
    "no hook": ("def memlong_register_backends(register): pass", "implements no memlong hook"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_plugin_is_reported_and_takes_nothing_down(install, install_good, how):
    source, reason = BROKEN[how]
    install("broken-memory", entry="broken", module="fake_broken_memory", source=source)
    install_good("acme")
    install_good("zeta")
    manager = PluginManager()

    report = report_of(manager, "broken")
    assert report.status == "failed"
    assert report.origin == "broken-memory 1.0"
    assert reason in report.reason
    assert len(report.reason) < 2_500
    assert report.error is not None
    assert (report.backends, report.retrievers) == ((), ())
    names = backend_names(manager)
    assert "half" not in names
    assert {"acme", "zeta"} <= set(names)
    loaded = {report.name for report in manager.reports if report.status == "loaded"}
    assert {"acme", "zeta", *BUILT_INS} <= loaded


def test_a_keyboard_interrupt_is_not_taken_for_a_broken_plugin(install):
    install("slow-memory", entry="slow", module="fake_slow_memory", source="raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        PluginManager()


def test_an_unreadable_entry_points_file_is_reported_and_hides_no_other(install, install_good):
    info = install("garbled-memory", entry="x", module="fake_garbled", source="")
    (info / "entry_points.txt").write_text("[memlong]\nthis line says nothing\n")
    install_good("acme")
    manager = PluginManager()
    report = report_of(manager, "garbled-memory")
    assert (report.status, report.origin) == ("failed", "garbled-memory 1.0")
    assert "acme" in backend_names(manager)


def test_a_distribution_of_many_plugins_is_reported_once(install, install_good):
    info = install("many-memory", entry="x", module="fake_many", source="")
    (info / "entry_points.txt").write_text("[memlong]\n" + "".join(f"p{i} = m{i}\n" for i in range(5000)))
    install_good("acme")
    manager = PluginManager()
    assert (
        report_of(manager, "many-memory").reason
        == "its entry points must name at most 100 plugins, got 5,000"
    )
    assert len(manager.reports) < 20
    assert "acme" in backend_names(manager)


def test_a_huge_name_of_a_plugin_is_cut(install):
    info = install("huge-memory", entry="x", module="fake_huge", source="")
    (info / "entry_points.txt").write_text(f"[memlong]\n{'x' * 10**6} = fake_huge\n")
    assert max(len(report.label) for report in PluginManager().reports) < 500


def test_a_plugin_that_cannot_be_compared_is_in_nobodys_way(install, install_good):
    source = (
        "from memlong.plugins.hookspecs import hookimpl\n"
        "class Odd:\n"
        "    __hash__ = object.__hash__\n"
        "    def __eq__(self, other): return self is other or 1 / 0\n"
        "    @hookimpl\n"
        "    def memlong_register_backends(self, register): register('odd', 'a:B')\n"
        "odd = Odd()\n"
    )
    info = install("odd-memory", entry="a_odd", module="fake_odd", source=source)
    (info / "entry_points.txt").write_text("[memlong]\na_odd = fake_odd:odd\n")
    install_good("zeta")
    assert {"odd", "zeta"} <= set(backend_names(PluginManager()))


def test_an_installation_without_metadata_does_no_harm(site: Path, install_good):
    (site / "gone-1.0.dist-info").mkdir()
    install_good("acme")
    assert "acme" in backend_names(PluginManager())


@pytest.mark.parametrize("metadata", [b"Name: caf\xe9\nVersion: 1\n", None], ids=["no text", "a folder"])
def test_metadata_that_cannot_be_read_hides_no_plugin(install, install_good, metadata):
    info = install("odd-memory", entry="odd", module="fake_odd_memory", source="1 / 0")
    (info / "METADATA").unlink()
    if metadata is None:
        (info / "METADATA").mkdir()
    else:
        (info / "METADATA").write_bytes(metadata)
    install_good("acme")
    manager = PluginManager()
    assert report_of(manager, "odd").origin == "an unnamed distribution"
    assert "acme" in backend_names(manager)


def test_what_is_left_of_a_removed_distribution_hides_no_later_one(install_good, tmp_path, monkeypatch):
    install_good("acme")
    left = tmp_path / "left"
    (left / "acme_memory-0.9.dist-info").mkdir(parents=True)
    monkeypatch.syspath_prepend(left)
    assert report_of(PluginManager(), "acme").origin == "acme-memory 1.0"


def test_a_distribution_that_is_shadowed_on_the_path_counts_once(install_good, tmp_path, monkeypatch):
    info = install_good("acme")
    older = tmp_path / "older" / "acme_memory-0.9.dist-info"
    older.mkdir(parents=True)
    (older / "METADATA").write_text("Metadata-Version: 2.1\nName: acme.memory\nVersion: 0.9\n")
    (older / "entry_points.txt").write_text((info / "entry_points.txt").read_text())
    monkeypatch.setattr(sys, "path", [*sys.path, str(older.parent)])
    assert report_of(PluginManager(), "acme").origin == "acme-memory 1.0"


def test_two_distributions_may_use_one_plugin_name(install):
    for who in ("one", "two"):
        source = hook(f"register('bank-{who}', 'bank:Bank')")
        install(f"{who}-memory", entry="memory", module=f"fake_{who}_memory", source=source)
    manager = PluginManager()
    assert {"bank-one", "bank-two"} <= set(backend_names(manager))
    reports = [report for report in manager.reports if report.name == "memory"]
    assert [report.origin for report in reports] == ["one-memory 1.0", "two-memory 1.0"]
