"""The pages of docs/results say what the JSON files say, and every result file has its page."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
PAGES = [*sorted(RESULTS.glob("*.md")), ROOT / "docs" / "choosing-a-backend.md"]


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    sys.path[:] = dict.fromkeys([*sys.path, str(ROOT / "bench")])  # where Python would look, too
    spec = importlib.util.spec_from_file_location("tables", ROOT / "bench" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_json_files(page, tables):
    text = page.read_text(encoding="utf-8")
    assert tables.filled(text) == text, "run python bench/tables.py"


def test_every_table_stands_in_one_page(tables):
    named = [name for page in PAGES for name in re.findall(r"<!-- table: (\S+) -->", page.read_text("utf-8"))]
    assert sorted(named) == sorted(tables.TABLES)


def test_every_result_file_is_linked():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for path in [*RESULTS.rglob("*.json"), *RESULTS.rglob("*.png")]:
        assert f"({path.relative_to(RESULTS)})" in text.replace("](results/", "]("), path


def test_a_changed_figure_is_noticed(tables, tmp_path, monkeypatch, capsys):
    page = tmp_path / "peers.md"
    page.write_text("<!-- table: peers -->\n" + tables.TABLES["peers"]() + "<!-- end -->\n", encoding="utf-8")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.main(["--check"]) == 0
    page.write_text(page.read_text(encoding="utf-8").replace("0.993", "0.994"), encoding="utf-8")
    assert tables.main(["--check"]) == 1
    assert "peers.md" in capsys.readouterr().out
    assert tables.main([]) == 0
    assert "0.994" not in page.read_text(encoding="utf-8")
