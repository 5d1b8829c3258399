"""The figures in docs/benchmarks.md: made from bench/results/latest.json, never typed.

Owns the part of that page between its two markers. A test compares the two files.
"""

import json
from pathlib import Path
from typing import Any

from bench.processes import PROJECT
from bench.table import heading, render
from bench.works import BENCHMARKS

LATEST = PROJECT / "bench" / "results" / "latest.json"
DOCUMENT = PROJECT / "docs" / "benchmarks.md"
BEGIN = "<!-- figures: made by python -m bench --document -->\n"
END = "<!-- end of figures -->\n"


def figures(results: dict[str, Any]) -> str:
    """The heading and every table, as a block of Markdown."""
    tables = [render(BENCHMARKS[name], result) for name, result in results["results"].items()]
    return "\n".join([BEGIN + "```text", heading(results), *tables]) + "```\n" + END


def split(page: str) -> tuple[str, str, str]:
    """The page before the figures, the figures with their markers, and the page after them."""
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"{DOCUMENT.name} must have each of these lines once: {BEGIN.strip()} {END.strip()}")
    before, _, rest = page.partition(BEGIN)
    inside, _, after = rest.partition(END)
    return before, BEGIN + inside + END, after


def write_figures(latest: Path = LATEST, document: Path = DOCUMENT) -> None:
    before, _, after = split(document.read_text())
    document.write_text(before + figures(json.loads(latest.read_text())) + after)
