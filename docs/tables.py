"""Writes the tables of figures into the pages, from ``benchmarks/results``.

A page holds ``<!-- table: NAME -->`` and ``<!-- /table -->``, and what is between them is written
by the function of that name in ``accuracy_tables.py``, ``cost_tables.py``, ``recipe_tables.py`` or
``search_tables.py``.

    python docs/tables.py           # write
    python docs/tables.py --check   # exit with 1, and name the page, where one is out of date
"""

from __future__ import annotations

import re
import sys

import accuracy_tables  # noqa: F401, registers its tables
import choosing_tables  # noqa: F401
import cost_tables  # noqa: F401
import noisy_tables  # noqa: F401
import recipe_tables  # noqa: F401
import search_tables  # noqa: F401
from results import ROOT, TABLES

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md")))
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def updated(text: str) -> str:
    """A page with its tables as the results are now.

    Raises:
        KeyError: the page asks for a table that is not here.
    """
    return BLOCK.sub(lambda m: f"{m[1]}{TABLES[m[2]]()}{m[3]}", text)


def main() -> int:
    """Write the pages, or with ``--check`` compare them; the exit code."""
    stale = []
    for page in PAGES:
        text = page.read_text()
        if updated(text) != text:
            stale.append(str(page.relative_to(ROOT)))
            if "--check" not in sys.argv[1:]:
                page.write_text(updated(text))
    if "--check" in sys.argv[1:] and stale:
        print(f"out of date: {', '.join(stale)}; run python docs/tables.py")  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
