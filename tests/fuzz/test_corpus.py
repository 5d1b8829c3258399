"""Every input that was kept, through its target again."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz import corpus
from tests.fuzz.targets import TARGETS
from tests.fuzz.worker import try_one

KEPT = sorted(file.stem for file in corpus.FOLDER.glob("*.hex"))


@pytest.mark.parametrize("name", KEPT)
def test_nothing_is_wrong_with_what_was_kept(name: str) -> None:
    inputs = corpus.read(name)
    assert inputs
    for data in inputs:
        what = try_one(TARGETS[name], data)
        assert what is None, f"python -m tests.fuzz --again {name} {data.hex()}\n{what}"


@pytest.mark.parametrize("name", KEPT)
def test_what_is_kept_is_small(name: str) -> None:
    assert (corpus.FOLDER / f"{name}.hex").stat().st_size <= corpus.MOST_FILE_BYTES


def test_what_is_kept_is_short_and_has_an_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "FOLDER", tmp_path)
    monkeypatch.setattr(corpus, "MOST_FILE_BYTES", 12)
    corpus.write("one", [b"cc", b"b", b"", b"a", b"b", b"x" * 2000, b"dd"])
    assert corpus.read("one") == [b"a", b"b", b"cc"]
