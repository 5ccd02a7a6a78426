"""A hook of mkdocs: public names in code font link to their entry in the API pages.

Docstrings and guides write `MemoryConfig` in plain backticks, which also reads well in `help()`. Here each becomes a
cross-reference, except in links, headings and blocks of code.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

_ENTRY = re.compile(r"^::: (\S+)$", re.MULTILINE)
_LEFT_ALONE = re.compile(r"(<(a|pre|h[1-6]|autoref)\b.*?</\2>)", re.DOTALL)
_CODE = re.compile(r"<code>([A-Za-z_][\w.]*)</code>")


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001
    """Turn names into cross-references."""
    entries = _entries(Path(config.docs_dir))

    def linked(match: re.Match[str]) -> str:
        entry = entries.get(match[1])
        return f'<autoref identifier="{entry}" optional>{match[0]}</autoref>' if entry else match[0]

    parts = re.split(_LEFT_ALONE, html)  # what is between, a part left alone, and the name of its tag; and again
    return "".join(
        _CODE.sub(linked, part) if number % 3 == 0 else part
        for number, part in enumerate(parts)
        if number % 3 != 2  # noqa: PLR2004
    )


def _entries(docs: Path) -> dict[str, str]:
    """Return the entries of the API pages by their last names."""
    pages = (page.read_text(encoding="utf-8") for page in sorted((docs / "api").glob("*.md")))
    return {entry.rpartition(".")[2]: entry for text in pages for entry in _ENTRY.findall(text)}
