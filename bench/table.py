"""Results as text: the same tables on the terminal and in docs/benchmarks.md. Pure."""

from typing import Any

from bench.measure import OTHERS_LIMIT_PERCENT, Benchmark, Figure, Ratio, disturbance_percent
from bench.peers import PEERS


def render(benchmark: Benchmark, result: dict[str, Any]) -> str:
    """One benchmark: a column for each peer, a line for each figure."""
    summary, rounds = result["summary"], len(result["rounds"])
    cpus = "one CPU" if len(result["cpus"]) == 1 else f"{len(result['cpus'])} CPUs"
    lines = [f"{benchmark.name}: {benchmark.title}"]
    lines.append(f"everything on {cpus}; median of {rounds} (min..max){_repeats(result)}")
    if result["quick"]:
        lines.append("QUICK: far fewer operations than it says; the figures are not worth quoting")
    rows = [["", *(PEERS[peer].title for peer in summary)]]
    for line in benchmark.all_lines:
        cells = [_cell(line, peer, summary[peer].get(line.key)) for peer in summary]
        if any(cells):
            rows.append([line.label, *cells])
    return "\n".join([*lines, "", *_columns(rows), *_warning(result)]) + "\n"


def heading(results: dict[str, Any]) -> str:
    """When, on what and with which versions."""
    machine = results["machine"]
    facts = [results["date"], f"{machine['cpu']} ({machine['cores']} cores)", machine["kernel"]]
    versions = [f"{name} {version}" for name, version in results["versions"].items()]
    return ", ".join([*facts, machine["file_system"]]) + "\n" + ", ".join(versions) + "\n"


def _repeats(result: dict[str, Any]) -> str:
    count = len(result["disturbed_rounds"])
    return f"; {count} more, disturbed by other processes, were repeated" if count else ""


def _warning(result: dict[str, Any]) -> list[str]:
    worst = max(disturbance_percent(figures) for figures in result["rounds"])
    if worst <= OTHERS_LIMIT_PERCENT:
        return []
    return [f"BUSY: other processes had up to {worst:.0f} % of the CPU time: repeat this when it is quiet"]


def _columns(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "   ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
    ]


def _cell(line: Figure | Ratio, peer: str, values: dict[str, float] | None) -> str:
    if values is None or (isinstance(line, Ratio) and peer == line.base):
        return ""
    middle, least, greatest = (f"{values[key]:,.{line.digits}f}" for key in ("median", "min", "max"))
    return f"{middle} ({least}..{greatest})"
