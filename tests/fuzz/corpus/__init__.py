"""Inputs that reached code which nothing before had reached: a file for each target, a line for each."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

FOLDER = Path(__file__).parent


def read(target: str) -> list[bytes]:
    """Those of a target; none if there is no file yet."""
    file = FOLDER / f"{target}.hex"
    return [bytes.fromhex(line) for line in file.read_text().split()] if file.exists() else []


def write(target: str, inputs: Iterable[bytes]) -> None:
    lines = sorted({data.hex() for data in inputs if data}, key=lambda line: (len(line), line))
    (FOLDER / f"{target}.hex").write_text("".join(f"{line}\n" for line in lines))
