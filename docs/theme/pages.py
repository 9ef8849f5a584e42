"""Pages of the site that are files at the top of the repository, included as they are there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parents[2]
PAGES = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
"""page -> file"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Called by MkDocs with the files of docs/."""
    from mkdocs.structure.files import File

    for page, source in PAGES.items():
        text = as_seen_from_docs((ROOT / source).read_text(encoding="utf-8"))
        alone = "---\nhide: [navigation]\n---\n" if page == "index.md" else ""
        files.append(File.generated(config, page, content=alone + text))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Called by MkDocs with each page: links of docs/ to these files, as the site has them."""
    for page, source in PAGES.items():
        markdown = markdown.replace(f"](../{source}", f"]({page}")
    return markdown


def as_seen_from_docs(text: str) -> str:
    """The same Markdown with its links into docs/ and to these files as docs/ has them."""
    for page, source in PAGES.items():
        text = text.replace(f"]({source}", f"]({page}")
    return text.replace("](docs/", "](")
