"""Storages as users name them: what is meant, how it is opened, and one line for what can't be."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ZODB
from ZODB.blob import BlobStorage
from ZODB.FileStorage import FileStorage
from ZODB.interfaces import IBlobStorage

import zeoid
from tests.admin.databases import Site
from zeoid.config.storages import named_storage
from zeoid.errors import ConfigurationError

Open = Callable[..., Any]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def opened() -> Iterator[Open]:
    """Opens a named storage, which is closed at the end."""
    storages = []

    def open_named(text: str, **options: Any) -> Any:
        storages.append(named_storage(text, **options).open())
        return storages[-1]

    yield open_named
    for storage in storages:
        storage.close()


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A closed data file `site.fs` and blobs `site-blobs`."""
    site = Site(tmp_path)
    site.commit(a=1)
    site.close()
    return site


def refusal(text: str, **options: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        named_storage(text, **options).open().close()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Data files -------------------------------------------------------------------------------------------


def test_a_data_file_is_only_read(opened: Open, site: Site, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    writer = opened("site.fs", writing=True)
    storage = opened("site.fs")
    assert type(storage) is FileStorage
    assert storage.isReadOnly()  # and not refused, although another one has it open for writing
    assert not writer.isReadOnly()
    storage.close()
    writer.close()
    assert before[site.path] == site.path.stat().st_mtime_ns


def test_the_end_of_a_damaged_source_is_not_cut_off(opened: Open, site: Site) -> None:
    """As FileStorage does when it may write."""
    with site.path.open("ab") as file:
        file.write(b"\x55" * 100)
    damaged = site.path.read_bytes()
    opened("site.fs")
    assert site.path.read_bytes() == damaged


def test_a_data_file_with_blobs(opened: Open, site: Site) -> None:
    assert IBlobStorage.providedBy(opened("site.fs", blob_directory="site-blobs"))
    assert not IBlobStorage.providedBy(opened("site.fs"))


def test_a_destination_is_made(opened: Open) -> None:
    storage = opened("new.fs", blob_directory="new-blobs", writing=True)
    assert Path("new.fs").exists()
    assert Path("new-blobs").is_dir()
    assert not storage.isReadOnly()


@pytest.mark.parametrize(
    ("text", "options", "what"),
    [
        ("nosuch.fs", {}, "nosuch.fs does not exist, and is no URI and no address"),
        ("nosuch", {}, "does not exist"),
        ("nosuch/Data.fs", {"writing": True}, "the directory nosuch does not exist"),
        (".", {"writing": True}, ". is a directory"),
        (".", {}, ". is a directory"),
        ("empty", {}, "empty is empty, which no data file is"),
        ("empty", {"writing": True}, "empty is empty, which no data file is"),
        ("site.fs", {"blob_directory": "nosuch"}, "there is no blob directory nosuch"),
        ("nosuch.conf", {"writing": True}, "there is no configuration file nosuch.conf"),
        ("nosuch.conf#main", {"writing": True}, "there is no configuration file nosuch.conf"),
        ("localhost:port", {}, "does not exist"),
        ("rubbish", {}, "rubbish is no data file, and no configuration file with a storage: "),
        ("binary", {}, "binary is no data file, and no configuration file with a storage: "),
    ],
)
def test_no_data_file(site: Site, text: str, options: dict[str, Any], what: str) -> None:
    Path("empty").touch()
    Path("rubbish").write_text("this is not\nan option")
    Path("binary").write_bytes(b"\xff\xfe\x00")
    assert what in refusal(text, **options)


def test_a_destination_that_is_in_use(opened: Open) -> None:
    opened("new.fs", writing=True)
    assert "in use by another process" in refusal("new.fs", writing=True)


@pytest.mark.parametrize("writing", [False, True], ids=["source", "destination"])
@pytest.mark.parametrize("kind", ["path", "URI", "configuration"])
def test_a_data_file_whose_journal_has_more(kind: str, writing: bool, tmp_path: Path) -> None:
    """A server is using it, or was killed: what was committed last is in the journal only."""
    Path("z.conf").write_text(f"<filestorage>\npath {tmp_path}/z.fs\n</filestorage>")
    name = {"path": "z.fs", "URI": f"file://{tmp_path}/z.fs", "configuration": "z.conf"}[kind]
    with zeoid.serve(tmp_path / "z.fs", path=str(tmp_path / "socket")) as server:
        storage = zeoid.ClientStorage(server.address)
        db = ZODB.DB(storage)
        told = refusal(name, writing=writing)
        db.close()
    # A destination that FileStorage opens itself is refused for its lock already.
    assert ("in use by another" if writing and kind != "path" else "run `zeoid recover") in told
    named_storage(name, writing=writing).open().close()  # after a clean stop


def test_a_journal_without_its_data_file(tmp_path: Path) -> None:
    with zeoid.serve(tmp_path / "z.fs", path=str(tmp_path / "socket")):
        pass
    (tmp_path / "z.fs").unlink()
    assert "z.fs.journal does: move that away first" in refusal("z.fs", writing=True)


# Servers ----------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Any]:
    with zeoid.serve({"1": tmp_path / "served.fs", "zoo": tmp_path / "zoo.fs"}) as server:
        yield server


@pytest.mark.parametrize(
    "form", ["127.0.0.1:{port}", "zeoid://127.0.0.1:{port}", "zeoid://127.0.0.1:{port}?storage=zoo"]
)
def test_a_server(opened: Open, server: Any, form: str) -> None:
    text = form.format(port=server.address.port)
    assert opened(text).isReadOnly()
    assert not opened(text, writing=True).isReadOnly()


def test_a_socket(opened: Open, tmp_path: Path) -> None:
    with zeoid.serve(None, path=str(tmp_path / "socket")):
        storage = opened("socket")
        assert isinstance(storage, zeoid.ClientStorage)
        storage.close()


def test_a_file_whose_name_looks_like_an_address(opened: Open, site: Site) -> None:
    site.path.rename("site:80")
    assert type(opened("site:80")) is FileStorage


def test_a_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zeoid.limits, "WAIT_TIMEOUT_S", 1.0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    assert address in refusal(f"zeoid://{address}?wait_timeout=0.5")


# URIs -------------------------------------------------------------------------------------------------


def test_a_file_uri_of_a_source_is_only_read(opened: Open, site: Site, tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/site.fs"
    assert opened(uri).isReadOnly()
    assert not opened(uri, writing=True).isReadOnly()
    storage = opened(f"{uri}?blobstorage_dir={tmp_path}/site-blobs")
    assert type(storage) is BlobStorage
    assert storage.isReadOnly()


def test_a_file_uri_of_a_source_makes_no_file(tmp_path: Path) -> None:
    assert "can't open file://" in refusal(f"file://{tmp_path}/nosuch.fs")
    assert not Path("nosuch.fs").exists()


@pytest.mark.parametrize(
    ("uri", "what"),
    [
        ("nosuch://here", "understands storages of the scheme nosuch://"),
        ("zeoid://zoo:7700?nosuch=1", "no such option: nosuch"),
        ("file:///tmp/x.fs?nosuch=1", "can't be read: UnknownDatabaseKeywords"),
        ("zconfig:///nosuch.conf", "can't be read: "),
        ("zeoid://zoo:7700/x", "behind a question mark"),
    ],
)
def test_a_uri_that_says_nothing(uri: str, what: str) -> None:
    assert what in refusal(uri)


def test_without_zodburi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zodburi", None)
    assert "pip install 'zeoid[uri]'" in refusal("zeo://localhost:8100")
    named_storage("zeoid://localhost:8100")  # needs none


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("nosuch://me:secret@host:5432/db?x=1", "nosuch://me:***@host:5432/db?x=1"),
        ("nosuch://host:5432?user=me&password=secret&x=1", "nosuch://host:5432?user=me&password=***&x=1"),
        ("nosuch://host:5432/db", "nosuch://host:5432/db"),
        ("nosuch://host/a@b:c", "nosuch://host/a@b:c"),
    ],
)
def test_a_password_is_not_shown(uri: str, name: str) -> None:
    told = refusal(uri)
    assert told.startswith(f"{name}: ")


def test_the_name_of_a_storage_hides_its_password() -> None:
    assert named_storage("zeo://me:secret@localhost:8100").name == "zeo://me:***@localhost:8100"


@pytest.mark.parametrize("text", ["zeoid://zoo:7700", "zoo:7700", "site.conf"])
def test_a_blob_directory_goes_with_a_data_file_only(site: Site, text: str) -> None:
    Path("site.conf").write_text("<filestorage>\npath site.fs\n</filestorage>")
    assert "name its blob directory there" in refusal(text, blob_directory="site-blobs")


# Configuration files ----------------------------------------------------------------------------------


def test_a_storage_in_a_configuration_file(opened: Open, site: Site) -> None:
    Path("zodb.conf").write_text("<filestorage>\npath site.fs\nblob-dir site-blobs\n</filestorage>")
    storage = opened("zodb.conf")
    assert storage.isReadOnly()
    assert IBlobStorage.providedBy(storage)
    assert not opened("zodb.conf", writing=True).isReadOnly()


def test_a_database_in_a_configuration_file(opened: Open, site: Site) -> None:
    Path("zodb.conf").write_text("<zodb main>\n<filestorage>\npath site.fs\n</filestorage>\n</zodb>")
    assert opened("zodb.conf").isReadOnly()
    assert opened("zodb.conf#main").getName().endswith("site.fs")


def test_what_wraps_a_storage_is_only_read_as_well(opened: Open, site: Site) -> None:
    Path("zodb.conf").write_text(
        "<blobstorage>\nblob-dir site-blobs\n<filestorage>\npath site.fs\n</filestorage>\n</blobstorage>"
    )
    assert opened("zodb.conf").isReadOnly()


def test_a_configured_source_makes_no_file() -> None:
    Path("zodb.conf").write_text("<filestorage>\npath nosuch.fs\n</filestorage>")
    assert "can't open zodb.conf: " in refusal("zodb.conf")
    assert not Path("nosuch.fs").exists()


TWO = "<mappingstorage one>\n</mappingstorage>\n<zodb two>\n<mappingstorage>\n</mappingstorage>\n</zodb>\n"


def test_one_of_several(opened: Open) -> None:
    Path("zodb.conf").write_text(TWO)
    opened("zodb.conf#one")
    opened("zodb.conf#two")
    assert "write zodb.conf#NAME" in refusal("zodb.conf")
    assert "has the name three" in refusal("zodb.conf#three")


def test_a_configuration_file_without_a_storage() -> None:
    Path("zodb.conf").write_text("# nothing\n")
    assert "there is no storage and no database in it" in refusal("zodb.conf")


def test_a_configuration_file_that_imports_what_is_not_installed() -> None:
    Path("zodb.conf").write_text("%import nosuch\n<nosuch>\n</nosuch>\n")
    assert "nosuch" in refusal("zodb.conf")
