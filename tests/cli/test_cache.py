"""`zeoid cache`: what is in a cache directory, whether it is sound, and how it is emptied."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from zeoid.cache.shared import SharedCache
from zeoid.cli import main

OIDS = [number.to_bytes(8, "big") for number in range(20)]
T1, T2 = b"\x03\xfb\xb5\x4d\0\0\0\1", b"\x03\xfb\xb5\x4d\0\0\0\2"
SIZE_BYTES = 2 * 1024**2
Run = Callable[..., str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(action: str, directory: Path, status: int = 0) -> str:
        assert main(["cache", action, str(directory)]) == status
        output = capsys.readouterr()
        return output.out + output.err

    return run


def filled(directory: Path, key: str = "1 at zoo:7700", data: bytes = b"data") -> None:
    """A cache that a process has left."""
    cache = SharedCache(directory, key, SIZE_BYTES)
    cache.applied()
    cache.started_over(T1)
    for oid in OIDS:
        cache.store(oid, T1, None, data)
    while cache.flush():
        pass
    cache.invalidate(T2, OIDS[:5])
    cache.close()


def test_what_there_is(tmp_path: Path, run: Run) -> None:
    filled(tmp_path)
    filled(tmp_path, "temp at zoo:7700")
    text = run("show", tmp_path)
    assert "storage 1 at zoo:7700" in text
    assert "storage temp at zoo:7700" in text
    assert text.count("not in use") == 2
    assert text.count("15 current revisions, 5 past ones, 0 evicted so far") == 2
    assert text.count(f"of {SIZE_BYTES:,} bytes used") == 2
    assert f"up to transaction {T2.hex()}" in text


def test_one_that_is_in_use(tmp_path: Path, run: Run) -> None:
    script = tmp_path / "cache"
    filled(script)
    other = tmp_path / "elsewhere"
    shutil.copytree(script, other)  # what this process has open it can't open twice
    cache = SharedCache(script, "1 at zoo:7700", SIZE_BYTES)
    cache.applied()
    text = run("show", script)
    assert "not in use" not in text
    assert "in use" in text
    cache.close()
    assert "not in use" in run("show", other)


def test_sound_and_damaged(tmp_path: Path, run: Run) -> None:
    filled(tmp_path, data=b"this is what an object has")
    assert "  sound" in run("verify", tmp_path)
    (data,) = tmp_path.glob("*/data.mdb")
    data.write_bytes(data.read_bytes().replace(b"this is what", b"That is what"))
    text = run("verify", tmp_path, status=1)
    assert "20 damaged revisions" in text
    assert "  sound" not in text


def test_one_that_was_cut_off(tmp_path: Path, run: Run) -> None:
    filled(tmp_path)
    (data,) = tmp_path.glob("*/data.mdb")
    data.write_bytes(data.read_bytes()[: SIZE_BYTES // 2])
    assert "can't be opened: it was cut off" in run("verify", tmp_path)


def test_clearing(tmp_path: Path, run: Run) -> None:
    filled(tmp_path)
    cache = SharedCache(tmp_path, "1 at zoo:7700", SIZE_BYTES)
    cache.applied()
    cache.started_over(T2)
    assert cache.load_before(OIDS[10], T2, T2) is not None
    assert "1 caches were removed" in run("clear", tmp_path)
    assert "there are no caches" in run("show", tmp_path)
    # Whoever uses it goes on.
    assert cache.load_before(OIDS[10], T2, T2) is not None
    cache.close()
    assert not list(tmp_path.glob("*/data.mdb"))


@pytest.mark.parametrize("action", ["show", "verify", "clear"])
def test_no_directory(tmp_path: Path, run: Run, action: str) -> None:
    assert "No such file or directory" in run(action, tmp_path / "nowhere", status=2)
