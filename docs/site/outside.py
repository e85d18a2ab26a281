"""A hook of MkDocs: files of the repository that pages link to are pages of the site, too.

The pages link to ``../examples/quickstart.py`` and the like, which is right wherever the repository is looked at. The
site has only ``docs/``, so each such link leads to a page that shows the file, or to a list of the files of a folder.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

DOCS = Path(__file__).parent.parent
ROOT = DOCS.parent
LINK = re.compile(r"\]\(\.\./([^)#\s]+)(#[^)\s]*)?\)")
LANGUAGES = {".py": "python", ".ipynb": "python", ".yml": "yaml", ".toml": "toml", ".sh": "sh"}


def page_of(path: str) -> str:
    """The page that a path of the repository is shown on."""
    return f"source/{path.strip('/')}.md"


def shown(path: str) -> str:
    """What that page says: the file, or what is in the folder."""
    there = ROOT / path
    if there.is_dir():
        names = sorted(p.relative_to(ROOT).as_posix() for p in there.iterdir() if p.suffix in LANGUAGES)
        return f"# {path}\n\n" + "".join(f"- [{name}](../{name})\n" for name in names)
    text = there.read_text()
    if there.suffix == ".md":  # at the top: seen from the page of it, docs/ and the top are one level up
        return re.sub(r"\]\((?!http|#)(?:docs/)?", "](../", text)
    if there.suffix == ".ipynb":
        return "\n\n".join(_cell(cell) for cell in json.loads(text)["cells"])
    return f"# {path}\n\n````{LANGUAGES.get(there.suffix, 'text')}\n{text}````\n"


def _cell(cell: dict[str, Any]) -> str:
    text = "".join(cell["source"])
    return text if cell["cell_type"] == "markdown" else f"````python\n{text}\n````"


def on_files(files: Files, config: Any) -> Files:
    """Add a page for everything outside that is linked to, and for what those pages link to."""
    waiting = [path for file in files.documentation_pages() for path, _ in LINK.findall(file.content_string)]
    while waiting:
        path = waiting.pop().strip("/")
        if not (ROOT / path).exists() or files.get_file_from_path(page_of(path)) is not None:
            continue  # a link to nowhere stays one, which MkDocs says
        text = shown(path)
        files.append(File.generated(config, page_of(path), content=text, inclusion=InclusionLevel.NOT_IN_NAV))
        if (ROOT / path).is_dir() or path.endswith(".md"):
            waiting += [linked for linked, _ in LINK.findall(text)]
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Let links out of ``docs/`` lead to these pages."""
    up = "../" * page.file.src_uri.count("/")

    def lead(found: re.Match[str]) -> str:
        return f"]({up}{page_of(found[1])}{found[2] or ''})" if (ROOT / found[1]).exists() else found[0]

    return LINK.sub(lead, markdown)
