"""What a benchmark is, and what becomes of the figures of its rounds. Pure: runs nothing, prints nothing."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench.peers import Peer

Figures = dict[str, float]  # what one peer did in one round
Round = dict[str, Figures]  # by the peer's name
Summary = dict[str, dict[str, dict[str, float]]]  # by peer and figure: median, min and max


@dataclass(frozen=True)
class Figure:
    """One line of a table: something that was measured."""

    key: str
    label: str
    digits: int = 0


@dataclass(frozen=True)
class Ratio:
    """One line of a table: a figure as a multiple of another peer's, or the other way round (`inverse`).

    *base_figure*: of that peer, if it is not the same one.
    """

    key: str
    label: str
    figure: str
    base: str
    inverse: bool = False
    digits: int = 2
    base_figure: str | None = None


# In every benchmark: CPU time of the CPUs in use that went to processes that are no part of it.
OTHERS = Figure("others_percent", "other processes' CPU, %", 1)
OTHERS_LIMIT_PERCENT = 10.0  # more than that, and the figures say more about the others


@dataclass(frozen=True)
class Benchmark:
    """One work, what it takes part in, and the lines of its table.

    `run` starts its peer in an empty folder, does the work once, stops the peer and returns the figures. With
    its last argument true it does less, to show that it works: the figures are then not worth much.
    """

    name: str
    title: str
    peers: tuple[str, ...]
    lines: tuple[Figure | Ratio, ...]
    run: Callable[[Peer, Path, bool], Figures]
    cpus: int = 1

    @property
    def all_lines(self) -> tuple[Figure | Ratio, ...]:
        return (*self.lines, OTHERS)


def disturbance_percent(figures: Round) -> float:
    """How much others took in the worst of a round's parts."""
    return max(part[OTHERS.key] for part in figures.values())


def summarise(benchmark: Benchmark, rounds: list[Round]) -> Summary:
    """Median, least and greatest over the rounds.

    A ratio is taken within each round, from two peers that ran shortly after each other, and the median
    afterwards: what slows the whole machine down for a while then slows both.
    """
    summary: Summary = {}
    for peer in rounds[0]:
        summary[peer] = {}
        for line in benchmark.all_lines:
            values = [value for figures in rounds if (value := _value(line, figures, peer)) is not None]
            if values:
                middle = median(values)
                summary[peer][line.key] = {"median": middle, "min": min(values), "max": max(values)}
    return summary


def _value(line: Figure | Ratio, figures: Round, peer: str) -> float | None:
    if isinstance(line, Figure):
        return figures[peer].get(line.key)
    mine, base = figures[peer].get(line.figure), figures.get(line.base, {}).get(
        line.base_figure or line.figure
    )
    if not mine or not base:
        return None
    return base / mine if line.inverse else mine / base
