"""Distributions that exist only as folders: a ``.dist-info`` and a module on ``sys.path``, no pip."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Install = Callable[..., Path]

GOOD = """
from memlong.plugins.hookspecs import hookimpl

@hookimpl
def memlong_register_backends(register):
    register({name!r}, {target!r}, description="a bank for tests")
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder on ``sys.path``, and an environment that selects no plugins."""
    monkeypatch.delenv("MEMLONG_PLUGINS", raising=False)
    monkeypatch.delenv("MEMLONG_DISABLE_PLUGINS", raising=False)
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    return folder


@pytest.fixture
def install(site: Path) -> Iterator[Install]:
    """``install("acme-memory", entry="acme", module="acme_memory", source="...")``: one plugin."""
    modules: list[str] = []

    def put(distribution: str, *, entry: str, module: str, source: str, version: str = "1.0") -> Path:
        info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[memlong]\n{entry} = {module}\n")
        (site / f"{module}.py").write_text(source)
        modules.append(module)
        importlib.invalidate_caches()
        return info

    yield put
    for module in modules:
        sys.modules.pop(module, None)


@pytest.fixture
def install_good(install: Install) -> Callable[..., Path]:
    """``install_good("acme")``: distribution ``acme-memory`` with plugin ``acme``, which works."""

    def put(entry: str, *, backend: str | None = None, target: str = "acme_bank:AcmeBank") -> Path:
        source = GOOD.format(name=backend or entry, target=target)
        return install(f"{entry}-memory", entry=entry, module=f"fake_{entry}_memory", source=source)

    return put
