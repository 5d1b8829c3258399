"""Opening a storage: it works, or one line says why not; then nothing is left open, or locked."""

from __future__ import annotations

import gc
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from zc.lockfile import LockError, LockFile
from ZODB.Connection import TransactionMetaData
from ZODB.FileStorage import FileStorage
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import StorageError
from ZODB.utils import p64

from tests.blobserver import RECORD
from tests.engines.datafiles import INFO, use_small_segments
from zeoid.engines.filestorage import FileStorageEngine
from zeoid.engines.opening import engine_of, open_filestorage, open_memory, open_storage
from zeoid.engines.storage import StorageEngine
from zeoid.errors import ConfigurationError
from zeoid.model import MAX_TID, NO_TID, Store
from zeoid.ports import Commit

NOBODY = 65534


@pytest.fixture(autouse=True, scope="module")
def small_segments() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        use_small_segments(patch)
        yield


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "Data.fs"


def fill(path: Path) -> None:
    engine = open_filestorage(path)
    prepared = engine.prepare(None, INFO, [Store(p64(1), NO_TID, b"data")])
    engine.commit([Commit(p64(7), b"id", prepared)])
    engine.close()


@contextmanager
def one_line(*words: str) -> Iterator[None]:
    """A ConfigurationError of one line with these words, and nothing left to the garbage collector."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        with pytest.raises(ConfigurationError) as caught:
            yield
        message = str(caught.value)
        assert "\n" not in message
        for word in words:
            assert word in message
        assert caught.value.__context__ is None
        del caught
        gc.collect()


def is_locked(path: Path) -> bool:
    try:
        LockFile(f"{path}.lock").close()
    except LockError:
        return True
    return False


# What works -----------------------------------------------------------------------------------------------


def test_a_new_data_file_is_made(path: Path) -> None:
    engine = open_filestorage(path)
    assert isinstance(engine, FileStorageEngine)
    assert path.exists()
    assert is_locked(path)
    engine.close()
    assert not is_locked(path)


def test_an_existing_data_file_is_opened(path: Path) -> None:
    fill(path)
    engine = open_filestorage(str(path))
    assert engine.load_before(p64(1), MAX_TID) == (b"data", p64(7), None)
    engine.close()


def test_a_data_file_that_another_process_may_write_can_be_read(path: Path) -> None:
    fill(path)
    writer = open_filestorage(path)
    engine = open_filestorage(path, read_only=True)
    assert engine.read_only
    assert engine.load_before(p64(1), MAX_TID) == (b"data", p64(7), None)
    engine.close()
    writer.close()


def test_a_storage_in_memory() -> None:
    engine = open_memory()
    assert (engine.name, engine.read_only, engine.last_tid()) == ("memory", False, NO_TID)
    engine.close()


def test_a_storage_of_any_kind() -> None:
    engine = open_storage("storage 'x'", MappingStorage)
    assert type(engine) is StorageEngine
    engine.close()


def test_a_data_file_that_was_packed_has_an_old_one_beside_it(path: Path) -> None:
    fill(path)
    Path(f"{path}.old").write_bytes(path.read_bytes())
    open_filestorage(path).close()


# What does not --------------------------------------------------------------------------------------------


def test_a_locked_data_file(path: Path) -> None:
    fill(path)
    engine = open_filestorage(path)
    with one_line(str(path), "in use by another process"):
        open_filestorage(path)
    assert is_locked(path)
    engine.close()


def test_a_directory(tmp_path: Path) -> None:
    with one_line(str(tmp_path), "is a directory", str(tmp_path / "Data.fs")):
        open_filestorage(tmp_path)


def test_a_directory_that_does_not_exist(tmp_path: Path) -> None:
    with one_line(str(tmp_path / "nosuch"), "does not exist"):
        open_filestorage(tmp_path / "nosuch" / "Data.fs")
    assert not (tmp_path / "nosuch").exists()


def test_a_file_below_a_file(path: Path) -> None:
    fill(path)
    with one_line("does not exist"):
        open_filestorage(path / "Data.fs")


@pytest.mark.parametrize(
    "content",
    [b"x", b"This is a letter to a friend.\n" * 100, b"FS2", b"\0" * 5000, b"PK\3\4" + b"z" * 300],
    ids=["one byte", "text", "magic cut off", "zeros", "archive"],
)
@pytest.mark.parametrize("read_only", [False, True])
def test_what_is_no_data_file(path: Path, content: bytes, read_only: bool) -> None:
    path.write_bytes(content)
    with one_line(str(path), "Is it a storage's data file?"):
        open_filestorage(path, read_only=read_only)
    assert path.read_bytes() == content
    assert not is_locked(path)


@pytest.mark.parametrize("read_only", [False, True])
def test_an_empty_file(path: Path, read_only: bool) -> None:
    path.touch()
    with one_line(str(path), "is empty"):
        open_filestorage(path, read_only=read_only)
    assert path.stat().st_size == 0
    assert not is_locked(path)


@pytest.mark.parametrize("left", ["old", "pack"])
def test_a_pack_that_was_interrupted_between_its_renames(path: Path, left: str) -> None:
    fill(path)
    path.rename(f"{path}.{left}")
    with one_line(str(path), f"{path}.{left}", "pack was interrupted"):
        open_filestorage(path)
    assert not path.exists()
    Path(f"{path}.{left}").rename(path)
    open_filestorage(path).close()


def test_a_file_that_a_read_only_server_would_have_to_make(path: Path) -> None:
    with one_line(str(path), "does not exist", "read-only"):
        open_filestorage(path, read_only=True)
    assert not path.exists()


@contextmanager
def as_nobody() -> Iterator[None]:
    """Root may write everywhere, so it must be somebody else."""
    if os.geteuid():
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that everybody may enter, as pytest's are not."""
    with TemporaryDirectory() as name:
        folder = Path(name) / "var"
        folder.mkdir()
        folder.parent.chmod(0o755)
        yield folder
        folder.chmod(0o755)


@pytest.mark.parametrize("mode", [0o555, 0o000, 0o666], ids=oct)
def test_a_folder_in_which_nothing_may_be_made(folder: Path, mode: int) -> None:
    folder.chmod(mode)
    with one_line(str(folder / "Data.fs"), "Permission denied"), as_nobody():
        open_filestorage(folder / "Data.fs")


def test_a_data_file_that_may_not_be_written(folder: Path) -> None:
    path = folder / "Data.fs"
    fill(path)
    folder.chmod(0o777)
    for file in folder.iterdir():
        file.chmod(0o444 if file == path else 0o777)
    with one_line(str(path), "Permission denied"), as_nobody():
        open_filestorage(path)
    assert not is_locked(path)
    with as_nobody():
        open_filestorage(path, read_only=True).close()


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (OSError(30, "Read-only file system"), "can't open storage 'x': Read-only file system"),
        (OSError("no number"), "can't open storage 'x': no number"),
        (StorageError("two\nlines"), "can't open storage 'x': StorageError: two lines"),
        (ValueError("odd"), "can't open storage 'x': ValueError: odd"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_storage_that_cant_be_opened(problem: Exception, words: str) -> None:
    def opener() -> None:
        raise problem

    with one_line(words):
        open_storage("storage 'x'", opener)


def test_a_mistake_in_a_program_is_no_matter_of_configuration() -> None:
    def opener() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        open_storage("storage 'x'", opener)


def test_a_file_that_is_gone_while_its_journal_is_there(path: Path) -> None:
    fill(path)
    content = path.read_bytes()
    path.unlink()
    with one_line(str(path), "but its journal does", f"{path}.journal"):
        open_filestorage(path)
    assert not path.exists()
    path.write_bytes(content)
    open_filestorage(path).close()


def test_a_storage_that_others_opened_does_not_fit_the_journal(path: Path) -> None:
    fill(path)
    back_up = path.read_bytes()
    engine = open_filestorage(path)
    engine.commit([Commit(p64(8), b"", engine.prepare(None, INFO, [Store(p64(2), NO_TID, b"lost")]))])
    engine.close()
    path.write_bytes(back_up)
    storage = FileStorage(str(path))
    with one_line("is not the file that its journal was written for", "zeoid recover"):
        engine_of(storage)
    storage.close()


def test_a_storage_that_others_opened_lacks_what_the_journal_has(path: Path, tmp_path: Path) -> None:
    fill(path)
    engine = open_filestorage(path)
    engine.commit([Commit(p64(8), b"", engine.prepare(None, INFO, [Store(p64(2), NO_TID, b"there")]))])
    copy = tmp_path / "copy" / "Data.fs"
    shutil.copytree(tmp_path, copy.parent, ignore=shutil.ignore_patterns("copy", "*.lock"))
    engine.close()
    for read_only in True, False:
        storage = FileStorage(str(copy), read_only=read_only)
        with one_line(f"zeoid recover {copy}"):
            engine_of(storage)
        storage.close()
    with one_line(f"zeoid recover {copy}"):
        open_filestorage(copy, read_only=True)
    open_filestorage(copy).close()
    for read_only in True, False:
        engine_of(FileStorage(str(copy), read_only=read_only)).close()


def test_a_data_file_is_opened_as_zodb_opens_it(path: Path) -> None:
    opener: Callable[[], FileStorage] = lambda: FileStorage(str(path))  # noqa: E731
    engine = open_storage(str(path), opener)
    assert type(engine) is FileStorageEngine
    engine.close()


# Blobs without their directory ----------------------------------------------------------------------------


def with_blob_at(path: Path, position: int, objects: int) -> None:
    """A data file, each object of which has a transaction of its own; one of them is a blob's."""
    storage = FileStorage(str(path))
    for number in range(objects):
        data = RECORD if number == position else b"\x80\x03cpersistent.mapping\nPersistentMapping\nq\x01."
        info = TransactionMetaData()
        storage.tpc_begin(info)
        storage.store(p64(number), NO_TID, data, "", info)
        storage.tpc_vote(info)
        storage.tpc_finish(info)
    storage.close()


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize(
    ("position", "objects"),
    [(0, 500), (100, 401), (499, 500), (0, 1)],
    ids=["the first", "one of those in between", "the newest", "the only one"],
)
def test_a_file_with_blobs_without_their_directory_is_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, position: int, objects: int, read_only: bool
) -> None:
    with_blob_at(tmp_path / "Data.fs", position, objects)
    open_filestorage(tmp_path / "Data.fs", read_only=read_only).close()
    (told,) = [record.getMessage() for record in caplog.records if "has blobs" in record.getMessage()]
    assert f"such as object {p64(position).hex()}, but no directory for them was given" in told


@pytest.mark.parametrize(("position", "blob_dir"), [(-1, None), (0, "blobs")], ids=["none", "with it"])
def test_nothing_is_told_where_all_is_well(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, position: int, blob_dir: str | None
) -> None:
    with_blob_at(tmp_path / "Data.fs", position, 10)
    open_filestorage(tmp_path / "Data.fs", blob_dir=blob_dir and tmp_path / blob_dir).close()
    open_filestorage(tmp_path / "New.fs").close()
    assert not [record for record in caplog.records if "has blobs" in record.getMessage()]
