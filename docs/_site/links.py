"""A hook of mkdocs: links that leave docs/ lead to copies in the site.

The pages are written to be read in the repository, too, where ``../README.md`` is a file. Here such a file becomes
part of the site, under ``repository/``, and so do the files that it leads to. A folder is its README; a folder without
one has no page, and its name stays as plain text.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
COPIES = "repository"
ALWAYS = ("CHANGELOG.md",)
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
_FENCE = re.compile(r"(^```.*?^```)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what pages link to outside docs/, and what that links to."""
    waiting = [ROOT / "docs" / page.src_uri for page in files.documentation_pages()]
    waiting += [ROOT / name for name in ALWAYS]
    seen: set[Path] = set()
    while waiting:
        source = waiting.pop()
        if source in seen:
            continue
        seen.add(source)
        uri = site_uri(source)
        if files.get_file_from_path(uri) is None:
            files.append(File.generated(config, uri, abs_src_path=str(source)))
        if source.suffix == ".md":
            waiting += [found for found in map(target_of(source), links_in(source)) if found is not None]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001
    """Rewrite the links of a page to where their targets are in the site."""
    source = Path(page.file.abs_src_path or "")
    find = target_of(source)

    def rewritten(match: re.Match[str]) -> str:
        mark, text, link = match.groups()
        name, hash_sign, section = link.partition("#")
        if not name or "://" in name:
            return match[0]
        target = find(link)
        if target is None:
            return text if (source.parent / name).is_dir() else match[0]
        path = os.path.relpath(site_uri(target), PurePosixPath(page.file.src_uri).parent)
        return f"{mark}[{text}]({path}{hash_sign}{section})"

    parts = _FENCE.split(markdown)
    return "".join(part if part.startswith("```") else _LINK.sub(rewritten, part) for part in parts)


def links_in(source: Path) -> list[str]:
    """Return the targets of a Markdown file's links and pictures, those of code left out."""
    text = _FENCE.sub("", source.read_text(encoding="utf-8"))
    return [match[3] for match in _LINK.finditer(text)]


def target_of(source: Path) -> Callable[[str], Path | None]:
    """Return a function that finds the file of the repository which a link in ``source`` leads to."""

    def find(link: str) -> Path | None:
        name = link.partition("#")[0]
        if not name or "://" in name:
            return None
        target = Path(os.path.normpath(source.parent / name))
        if target.is_dir():
            target = target / "README.md"
        return target if target.is_file() and target.is_relative_to(ROOT) else None

    return find


def site_uri(source: Path) -> str:
    """Return where a file of the repository is in the site."""
    path = source.relative_to(ROOT)
    return path.relative_to("docs").as_posix() if path.parts[0] == "docs" else f"{COPIES}/{path.as_posix()}"
