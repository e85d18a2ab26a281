"""An extension of Griffe: docstrings as they are written here, in the form that mkdocstrings reads.

They have one ``Example:`` and, where they name other objects, Sphinx's roles; parameters that one sentence is said
of stand in front of it together.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|mod|meth|attr|data|exc|obj):`(~?)([\w.]+)`")
TOGETHER = re.compile(r"^( +)(\w+(?:, \w+)+):( .*(?:\n\1 +.*)*)", re.M)
MATH = re.compile(r":math:`([^`]*)`")


def read(text: str) -> str:
    """Turn one docstring's text into Markdown.

    Example:
        >>> read("See :class:`~singe_plugin.Pace`.")
        'See <autoref optional identifier="singe_plugin.Pace"><code>Pace</code></autoref>.'
    """

    def link(found: re.Match[str]) -> str:
        name = found[2].rpartition(".")[2] if found[1] else found[2]
        home = found[2] if found[2].startswith("singe_plugin") else f"singe_plugin.{found[2].lstrip('.')}"
        return f'<autoref optional identifier="{home}"><code>{name}</code></autoref>'

    def apart(found: re.Match[str]) -> str:
        return "\n".join(f"{found[1]}{name}:{found[3]}" for name in found[2].split(", "))

    text = TOGETHER.sub(apart, text)
    text = re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.M)
    return MATH.sub(r"`\1`", ROLE.sub(link, text))


class Docstrings(griffe.Extension):
    """Applies :func:`read` to every docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = read(obj.docstring.value)
