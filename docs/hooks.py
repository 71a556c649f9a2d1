"""What MkDocs does to the pages beyond its plugins.

Equations become MathML, which browsers show without a script; references in docstrings, which are
written for Sphinx, become plain code.
"""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
DISPLAY = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)
ROLE = re.compile(r":(?:class|func|meth|data|mod|attr):<code>~?(?:hf_auxselect\.)?(.*?)</code>")


def on_page_content(content: str, **kwargs: Any) -> str:
    """The page with its equations and references replaced."""
    content = INLINE.sub(lambda m: convert(html.unescape(m[1])), content)
    content = DISPLAY.sub(
        lambda m: f'<div class="equation">{convert(html.unescape(m[1]), display="block")}</div>',
        content,
    )
    return ROLE.sub(r"<code>\1</code>", content)
