"""The README is short, and make targets that README and docs name exist; all else is tested in test_docs.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
TARGETS = sorted(set(re.findall(r"(?<=[`\n])make ([\w-]+)", TEXT)) - {"and"})


@pytest.mark.parametrize("target", TARGETS)
def test_make_targets_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)


def test_make_targets_are_seen():
    assert {"demo", "test", "test-all", "lint", "bench"} <= set(TARGETS)


def test_the_readme_fits_a_minute():
    assert len(PAGES[0].read_text(encoding="utf-8").splitlines()) < 90
