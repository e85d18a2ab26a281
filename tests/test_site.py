"""The site builds without a warning, loads nothing from elsewhere, and has what the pages and the API promise."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocstrings_handlers.python")
pytest.importorskip("material")

from mkdocs.commands.build import build
from mkdocs.config import load_config

import singe_plugin

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "docs/site/mkdocs.yml"), site_dir=str(folder), strict=True))  # raises at a warning
    return folder


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    loads = re.compile(r"<(?:script|img|iframe)[^>]*\bsrc=\"(https?:|//)|<link[^>]*\bhref=\"(https?:|//)")
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    assert [page.name for page in pages if loads.search(page.read_text())] == []
    assert [
        sheet.name for sheet in site.rglob("*.css") if re.search(r"url\([\"']?(https?:)?//", sheet.read_text())
    ] == []


def test_every_public_name_is_there_with_its_docstring(site: Path) -> None:
    page = (site / "api.html").read_text()
    assert [name for name in singe_plugin.__all__ if f'id="singe_plugin.{name}"' not in page] == []
    assert "Prune a trained model with SInGE" in page
    assert re.findall(r":(?:class|func|mod|meth|data):", page) == []  # Sphinx's roles became links
    assert not re.search(r"<blockquote>\s*<blockquote>\s*<blockquote>", page)  # an example that was read as quotes


def test_files_outside_of_the_pages_are_shown(site: Path) -> None:
    usage = (site / "usage.html").read_text()
    assert 'href="source/singe_plugin/method/surgeon.py.html"' in usage
    assert "SInGEPruner for TaylorPruner" in (site / "source/examples/nni_config.py.html").read_text()
    assert "A YOLO of ultralytics" in (site / "source/examples/notebooks/yolo.ipynb.html").read_text()
    assert 'href="../results.html"' in (site / "source/README.md.html").read_text()
    assert 'href="source/README.md.html#limits"' in (site / "beyond.html").read_text()


def test_docstrings_in_the_form_that_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs/site"))
    sys.modules.pop("docstrings", None)
    from docstrings import read

    assert read("See :func:`shrink`.") == (
        'See <autoref optional identifier="singe_plugin.shrink"><code>shrink</code></autoref>.'
    )
    assert read("Args:\n    a, b: one\n        two.\n    c: x.\n\nExample:\n    >>> 1") == (
        "Args:\n    a: one\n        two.\n    b: one\n        two.\n    c: x.\n\nExamples:\n    >>> 1"
    )
    assert read(":math:`x`") == "`x`"
