"""A data file, its journal and its blobs, as they may be found: what is done, and what is refused."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ZODB.FileStorage import FileStorage
from ZODB.POSException import ReadOnlyError, Unsupported

from tests.engines.blobfiles import final_files, staged_files
from tests.engines.datafiles import (
    A,
    B,
    C,
    Database,
    databases,
    in_stock_storage,
    tid,
    use_no_keeper,
    use_small_segments,
)
from tests.engines.journals import Quick
from zeoid import limits
from zeoid.cli import main
from zeoid.engines.disk import StrPath
from zeoid.engines.journal import dump
from zeoid.engines.opening import engine_of, open_filestorage
from zeoid.engines.recovery import journal_directory, set_aside
from zeoid.errors import ConfigurationError

Start = Callable[..., Database]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_segments(monkeypatch, 64 * 1024)
    use_no_keeper(monkeypatch)
    monkeypatch.setattr(limits, "BATCH_BYTES", 3000)


@pytest.fixture
def start() -> Iterator[Start]:
    yield from databases()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "Data.fs"


@pytest.fixture
def blob_dir(tmp_path: Path) -> Path:
    return tmp_path / "blobs"


class Watched(Quick):
    """A disk that knows when everything was synced."""

    def __init__(self) -> None:
        self.synced_all = 0

    def sync_all(self, path: StrPath) -> None:
        self.synced_all += 1


def crashed(path: Path, blob_dir: Path, start: Start) -> tuple[bytes, bytes]:
    """Leave a database whose last two transactions only the journal has for sure: their tids."""
    database = start(path, blob_dir=blob_dir)
    database.store_blobs((C, b"settled"))
    database.engine.checkpoint()
    first = database.store_blobs((A, b"one"))
    second = database.store_blobs((A, b"two"), (B, b"two b"))
    database.kill()
    return first, second


def refused(path: Path, blob_dir: Path | None, *words: str) -> None:
    """It isn't opened, one line says why, and nothing is changed."""

    def found() -> dict[Path, bytes]:
        files = path.parent.rglob("*")
        return {file: file.read_bytes() for file in files if file.is_file() and file.suffix != ".lock"}

    before = found()
    with pytest.raises(ConfigurationError) as caught:
        Database(path, blob_dir=blob_dir)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    assert found() == before


# After a crash -----------------------------------------------------------------------------------------


def test_final_names_that_a_crash_lost_are_given_again(path: Path, blob_dir: Path, start: Start) -> None:
    first, second = crashed(path, blob_dir, start)
    for name in final_files(blob_dir):
        if first.hex() in name or second.hex() in name:
            (blob_dir / name).unlink()
            with contextlib.suppress(OSError):
                os.removedirs(os.path.dirname(blob_dir / name))
    os.truncate(path, 4 + (path.stat().st_size - 4) // 2)
    database = start(path, blob_dir=blob_dir)
    assert database.blob(A, first) == b"one"
    assert [database.blob(oid, second) for oid in (A, B)] == [b"two", b"two b"]
    assert staged_files(blob_dir) == []
    database.close()
    assert len(in_stock_storage(path, blob_dir)) == 3


def test_the_blob_directory_must_be_given(path: Path, blob_dir: Path, start: Start, tmp_path: Path) -> None:
    _, second = crashed(path, blob_dir, start)
    refused(path, None, "journal has transactions with blobs", "zeoid recover --blob-dir")
    refused(path, tmp_path / "nosuch", f"{tmp_path / 'nosuch'} does not exist")
    (tmp_path / "other").mkdir()
    refused(path, tmp_path / "other", "neither", "Is it the right directory?", "--trust-data-file")
    assert list((tmp_path / "other").iterdir()) == []
    database = start(path, blob_dir=blob_dir)
    assert database.blob(A, second) == b"two"
    database.close()
    start(path).close()  # nothing is left to be done with blobs


def test_a_blob_that_is_gone_is_refused(path: Path, blob_dir: Path, start: Start) -> None:
    first, _ = crashed(path, blob_dir, start)
    for name in staged_files(blob_dir):
        (blob_dir / ".staged" / name).unlink()
    (lost,) = (name for name in final_files(blob_dir) if first.hex() in name)
    (blob_dir / lost).unlink()
    refused(path, blob_dir, "neither", first.hex(), "2 transactions that only the journal has")


def test_another_file_in_the_place_of_a_blob_is_refused(path: Path, blob_dir: Path, start: Start) -> None:
    first, _ = crashed(path, blob_dir, start)
    (name,) = (name for name in final_files(blob_dir) if first.hex() in name)
    (blob_dir / name).unlink()
    (blob_dir / name).write_bytes(b"eno")
    refused(path, blob_dir, "is not what was committed")
    (blob_dir / name).write_bytes(b"one")  # as a back-up puts it there
    database = start(path, blob_dir=blob_dir)
    assert database.blob(A, first) == b"one"
    database.close()


@pytest.mark.parametrize("placed", [True, False])
def test_blobs_of_a_large_transaction_that_was_not_confirmed_are_taken_back(
    path: Path, blob_dir: Path, start: Start, placed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = start(path, blob_dir=blob_dir)
    database.store_blobs((A, b"before"))
    database.engine.checkpoint()
    monkeypatch.setattr(limits, "BATCH_BYTES", 10)

    class Cut(Exception):
        pass

    def cut(*given: object) -> None:
        raise Cut

    monkeypatch.setattr(
        database.appender if placed else database.appender.blobs, "_state" if placed else "place", cut
    )
    with pytest.raises(Cut):
        database.store_blobs((A, b"never"), (B, b"never b"))
    assert len(final_files(blob_dir)) == (3 if placed else 1)
    database.kill()
    refused(path, None, "journal has transactions with blobs")
    monkeypatch.undo()
    database = start(path, blob_dir=blob_dir)
    assert list(final_files(blob_dir).values()) == [b"before"]
    assert staged_files(blob_dir) == []
    assert database.store_blobs((A, b"after")) == tid(2)
    assert database.blob(A, tid(2)) == b"after"
    database.close()


def test_an_upload_that_was_never_voted_on_is_swept(path: Path, blob_dir: Path, start: Start) -> None:
    database = start(path, blob_dir=blob_dir)
    database.stage(b"never")
    unfinished = database.engine.stage_blob()
    unfinished.write(b"nor this")
    database.kill()
    assert len(staged_files(blob_dir)) == 2
    database = start(path, blob_dir=blob_dir)
    assert staged_files(blob_dir) == []
    unfinished.abandon()
    database.close()


def test_what_others_wrote_is_made_durable_before_it_is_relied_on(
    path: Path, blob_dir: Path, start: Start
) -> None:
    """A stock server syncs neither blobs nor directories."""

    def synced() -> int:
        disk = Watched()
        start(path, disk, blob_dir).close()
        return disk.synced_all

    storage = FileStorage(str(path), blob_dir=str(blob_dir))
    storage.close()
    assert synced() == 1
    assert synced() == 0
    from tests.engines.test_recovery import stock

    stock(path, b"one")
    assert synced() == 1
    shutil.rmtree(journal_directory(str(path)))
    assert synced() == 1
    assert synced() == 0


# A back-up ---------------------------------------------------------------------------------------------


def test_trusting_the_data_file_sets_what_was_staged_aside(path: Path, blob_dir: Path, start: Start) -> None:
    crashed(path, blob_dir, start)
    staged = staged_files(blob_dir)
    assert len(staged) == 3
    shutil.copy(path, path.with_name("back-up"))
    set_aside(str(path), Quick(), "aside", str(blob_dir))
    assert sorted(os.listdir(blob_dir / ".staged.aside")) == staged
    assert staged_files(blob_dir) == []
    database = start(path, blob_dir=blob_dir)
    assert sorted(os.listdir(blob_dir / ".staged.aside")) == staged
    database.close()


# What it is opened with ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["bushy", "lawn"])
def test_a_stock_storage_goes_on_with_it_after_a_clean_stop(
    path: Path, blob_dir: Path, start: Start, layout: str
) -> None:
    start(path).close()
    blob_dir.mkdir()
    (blob_dir / ".layout").write_text(layout)
    database = start(path, blob_dir=blob_dir)
    first = database.store_blobs((A, b"one"))
    second = database.store_blobs((A, b"two"))
    database.close()
    storage = FileStorage(str(path), blob_dir=str(blob_dir))
    try:
        assert storage.fshelper.layout_name == layout
        for at, content in ((first, b"one"), (second, b"two")):
            assert Path(storage.loadBlob(A, at)).read_bytes() == content
            assert not os.stat(storage.loadBlob(A, at)).st_mode & 0o222
    finally:
        storage.close()
    database = start(path, blob_dir=blob_dir)
    assert database.blob(A, first) == b"one"
    database.close()


def test_blobs_without_their_data_file_are_not_removed(path: Path, blob_dir: Path, start: Start) -> None:
    """As FileStorage does when it makes a new data file."""
    database = start(path, blob_dir=blob_dir)
    database.store_blobs((A, b"content"))
    database.close()
    path.rename(path.with_name("mislaid"))
    shutil.rmtree(journal_directory(str(path)))
    refused(path, blob_dir, "does not exist", "has blobs", "put the data file back")
    assert list(final_files(blob_dir).values()) == [b"content"]
    path.with_name("mislaid").rename(path)
    start(path, blob_dir=blob_dir).close()


def test_an_open_stock_storage_becomes_an_engine_with_blobs(path: Path, blob_dir: Path) -> None:
    engine = engine_of(FileStorage(str(path), blob_dir=str(blob_dir)), Quick())
    file = engine.stage_blob()
    file.write(b"x")
    engine.discard_blobs([file.complete()])
    assert staged_files(blob_dir) == []
    engine.close()


def test_a_read_only_engine_reads_blobs_and_makes_nothing(path: Path, blob_dir: Path, start: Start) -> None:
    with pytest.raises(ConfigurationError):
        open_filestorage(path, blob_dir=blob_dir, read_only=True)
    database = start(path, blob_dir=blob_dir)
    at = database.store_blobs((A, b"content"))
    database.close()
    os.rmdir(blob_dir / ".staged")
    engine = open_filestorage(path, blob_dir=blob_dir, read_only=True)
    with engine.open_blob(A, at) as file:
        assert file.read() == b"content"
    with pytest.raises(ReadOnlyError):
        engine.stage_blob()
    with pytest.raises(ReadOnlyError):
        engine.take_shared_blob(A, "x.tmp")
    engine.close()
    assert not (blob_dir / ".staged").exists()
    with pytest.raises(ConfigurationError, match="nosuch does not exist"):
        open_filestorage(path, blob_dir=path.with_name("nosuch"), read_only=True)


def test_an_engine_without_a_directory_takes_no_blobs(path: Path, start: Start) -> None:
    database = start(path)
    for call in (
        database.engine.stage_blob,
        lambda: database.engine.open_blob(A, tid(1)),
        lambda: database.engine.take_shared_blob(A, "x.tmp"),
    ):
        with pytest.raises(Unsupported, match="no directory for blobs"):
            call()
    database.close()


# The command -------------------------------------------------------------------------------------------


def test_the_command_recovers_blobs_where_it_is_told_to_look(
    path: Path,
    blob_dir: Path,
    start: Start,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.CRITICAL)
    _, second = crashed(path, blob_dir, start)
    assert "2 blobs" in "\n".join(dump(journal_directory(str(path)), Quick()))
    assert main(["recover", str(path)]) != 0
    assert "--blob-dir" in capsys.readouterr().err
    assert main(["recover", "--blob-dir", f"{blob_dir}x", str(path)]) != 0
    assert "does not exist" in capsys.readouterr().err
    assert main(["recover", "--blob-dir", str(blob_dir), str(path)]) == 0
    assert f"its last transaction is {second.hex()}" in capsys.readouterr().out
    assert sorted(final_files(blob_dir).values()) == [b"one", b"settled", b"two", b"two b"]
    assert staged_files(blob_dir) == []
