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
_LEFT_ALONE = r"<(?P<tag>a|pre|h[1-6]|autoref)\b.*?</(?P=tag)>"
_NAME = re.compile(rf"{_LEFT_ALONE}|<code>(?P<name>[A-Za-z_][\w.]*)</code>", re.DOTALL)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001
    """Turn names into cross-references."""
    entries = _entries(Path(config.docs_dir))

    def linked(match: re.Match[str]) -> str:
        entry = entries.get(match["name"] or "")
        return f'<autoref identifier="{entry}" optional>{match[0]}</autoref>' if entry else match[0]

    return _NAME.sub(linked, html)


def _entries(docs: Path) -> dict[str, str]:
    """Return the entries of the API pages by their last names."""
    pages = (page.read_text(encoding="utf-8") for page in sorted((docs / "api").glob("*.md")))
    return {entry.rpartition(".")[2]: entry for text in pages for entry in _ENTRY.findall(text)}
