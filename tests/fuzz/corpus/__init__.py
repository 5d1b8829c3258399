"""Inputs that reached code which nothing before had reached: a file for each target, a line for each."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

FOLDER = Path(__file__).parent
MOST_INPUT_BYTES = 1024
MOST_FILE_BYTES = 100_000


def read(target: str) -> list[bytes]:
    """Those of a target; none if there is no file yet."""
    file = FOLDER / f"{target}.hex"
    return [bytes.fromhex(line) for line in file.read_text().split()] if file.exists() else []


def write(target: str, inputs: Iterable[bytes]) -> None:
    """Keep those that are short, the shortest first, as many as a file should have."""
    lines = sorted(
        {data.hex() for data in inputs if 0 < len(data) <= MOST_INPUT_BYTES},
        key=lambda line: (len(line), line),
    )
    kept, left = [], MOST_FILE_BYTES
    for line in lines:
        left -= len(line) + 1
        if left < 0:
            break
        kept.append(f"{line}\n")
    (FOLDER / f"{target}.hex").write_text("".join(kept))
