"""What `zeoid serve` is to do: from a path, or from a configuration file as ZEO's servers take it."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.server.processes import root_logger_restored
from zeoid import limits
from zeoid.addresses import DEFAULT_PORT, Address, TcpAddress, UnixAddress
from zeoid.config.serving import ServingOptions, read_configuration, storages_of_path
from zeoid.engines.filestorage import FileStorageEngine
from zeoid.engines.storage import StorageEngine
from zeoid.errors import ConfigurationError
from zeoid.ports import Engine

ZEO = "<zeo>\n  address localhost:7700\n</zeo>\n"
MEMORY = "<mappingstorage>\n</mappingstorage>\n"


# A path ---------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("INSTANCE_HOME", raising=False)


def opened(openers: dict[str, Callable[[], Engine]]) -> dict[str, str]:
    """The storages by name, with the name that each has for itself."""
    names = {}
    for name, opener in openers.items():
        engine = opener()
        names[name] = engine.name
        engine.close()
    return names


def test_a_data_file() -> None:
    assert opened(storages_of_path("Data.fs", memory=False, read_only=False)) == {"1": "Data.fs"}
    assert Path("Data.fs").exists()


def test_a_data_file_to_be_read() -> None:
    opened(storages_of_path("Data.fs", memory=False, read_only=False))
    (opener,) = storages_of_path("Data.fs", memory=False, read_only=True).values()
    engine = opener()
    assert engine.read_only
    engine.close()


def test_nothing_is_opened_before_it_is_asked_for() -> None:
    storages_of_path("Data.fs", memory=False, read_only=False)
    assert not Path("Data.fs").exists()


def test_memory() -> None:
    assert opened(storages_of_path(None, memory=True, read_only=False)) == {"1": "memory"}


def test_a_data_file_with_blobs() -> None:
    (opener,) = storages_of_path("Data.fs", memory=False, read_only=False, blob_dir="blobs").values()
    engine = opener()
    assert engine.has_blobs
    engine.close()
    assert Path("blobs/.layout").exists()


def test_memory_keeps_no_blobs() -> None:
    with pytest.raises(ConfigurationError, match="--blob-dir goes with a data file"):
        storages_of_path(None, memory=True, read_only=False, blob_dir="blobs")


def test_memory_and_a_data_file() -> None:
    with pytest.raises(ConfigurationError, match="a data file or --memory, not both"):
        storages_of_path("Data.fs", memory=True, read_only=False)


@pytest.mark.parametrize("mark", ["etc/zope.conf", "etc/zope.ini", "var/Data.fs"])
@pytest.mark.parametrize("named", [False, True], ids=["current folder", "INSTANCE_HOME"])
def test_the_data_file_of_a_zope_instance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mark: str, named: bool
) -> None:
    home = tmp_path / "instance" if named else tmp_path
    (home / "var").mkdir(parents=True)
    (home / mark).parent.mkdir(exist_ok=True)
    if mark == "var/Data.fs":
        opened(storages_of_path(str(home / mark), memory=False, read_only=False))
    else:
        (home / mark).touch()
    if named:
        monkeypatch.setenv("INSTANCE_HOME", str(home))
    (name,) = opened(storages_of_path(None, memory=False, read_only=False)).values()
    assert Path(name).resolve() == (home / "var" / "Data.fs").resolve()


@pytest.mark.parametrize("made", [[], ["var"], ["etc/zope.conf"], ["Data.fs"]], ids=str)
def test_a_folder_that_is_no_zope_instance(made: list[str]) -> None:
    for name in made:
        if name == "var":
            Path(name).mkdir()
        else:
            Path(name).parent.mkdir(exist_ok=True)
            Path(name).touch()
    with pytest.raises(ConfigurationError, match="which data file"):
        storages_of_path(None, memory=False, read_only=False)


# A configuration file -------------------------------------------------------------------------------------


@pytest.fixture
def configured(tmp_path: Path) -> Callable[[str], ServingOptions]:
    """The options in a file with this text."""

    def configured(text: str) -> ServingOptions:
        path = tmp_path / "server.conf"
        path.write_text(text)
        return read_configuration(str(path))

    return configured


Configured = Callable[[str], ServingOptions]


def test_the_least_that_is_needed(configured: Configured) -> None:
    options = configured(ZEO + MEMORY)
    default = ServingOptions()
    assert options.addresses == (TcpAddress("localhost", 7700),)
    assert list(options.storages) == ["1"]
    assert (options.read_only, options.offer, options.pid_file, options.start_log) == (
        False,
        "Z5",
        None,
        None,
    )
    assert not options.resolve_conflicts
    assert options.transaction_timeout_s == default.transaction_timeout_s == limits.TRANSACTION_TIMEOUT_S
    assert (
        options.invalidation_log_transactions
        == default.invalidation_log_transactions
        == limits.INVALIDATION_LOG_TRANSACTIONS
    )


def test_without_a_file() -> None:
    assert ServingOptions().addresses == (TcpAddress("localhost", DEFAULT_PORT),)


def test_everything(configured: Configured) -> None:
    options = configured(
        """
        %define PORT 7701
        <zeo>
          address localhost:$PORT
          read-only true
          msgpack true
          transaction-timeout 2.5
          invalidation-queue-size 7
          invalidation-age 3600
          client-conflict-resolution false
          pid-filename /run/zeo.pid
        </zeo>
        <mappingstorage main>
        </mappingstorage>
        <demostorage temporary>
        </demostorage>
        """
    )
    assert options.addresses == (TcpAddress("localhost", 7701),)
    assert list(options.storages) == ["main", "temporary"]
    assert (options.read_only, options.offer, options.pid_file) == (True, "M5", Path("/run/zeo.pid"))
    assert (options.transaction_timeout_s, options.invalidation_log_transactions) == (2.5, 7)
    assert options.resolve_conflicts
    for name in opened(options.storages).values():
        assert name


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("localhost:7700", TcpAddress("localhost", 7700)),
        ("127.0.0.1:0", TcpAddress("127.0.0.1", 0)),
        ("[::1]:7700", TcpAddress("::1", 7700)),
        ("7700", TcpAddress("", 7700)),
        (":7700", TcpAddress("", 7700)),
        ("/run/zeo.sock", UnixAddress("/run/zeo.sock")),
        ("var/zeo.sock", UnixAddress("var/zeo.sock")),
    ],
)
def test_addresses(configured: Configured, text: str, address: Address) -> None:
    assert configured(f"<zeo>\n address {text}\n</zeo>\n{MEMORY}").addresses == (address,)


def test_storages_are_opened_as_zodb_opens_them(configured: Configured, tmp_path: Path) -> None:
    options = configured(f"{ZEO}<filestorage big>\n path {tmp_path}/big.fs\n</filestorage>\n{MEMORY}")
    engines = {name: opener() for name, opener in options.storages.items()}
    assert type(engines["big"]) is FileStorageEngine
    assert type(engines["1"]) is StorageEngine
    for engine in engines.values():
        engine.close()


def test_a_log_file(configured: Configured, tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    options = configured(
        f"{ZEO}{MEMORY}<eventlog>\n level info\n <logfile>\n  path {log}\n </logfile>\n</eventlog>\n"
    )
    assert options.start_log is not None
    with root_logger_restored():
        options.start_log()
        logging.getLogger("zeoid.server").info("a line")
    assert "a line" in log.read_text()


def test_a_log_file_that_cant_be_written(configured: Configured) -> None:
    options = configured(
        f"{ZEO}{MEMORY}<eventlog>\n <logfile>\n  path /nosuch/server.log\n </logfile>\n</eventlog>\n"
    )
    assert options.start_log is not None
    with pytest.raises(
        ConfigurationError, match=r"server\.conf: can't write the log /nosuch/server\.log: No"
    ):
        options.start_log()


# What is wrong with it ------------------------------------------------------------------------------------

WRONG = {
    "unknown key": (5, "'nosuch' is not a known key name", f"{MEMORY}<zeo>\n address 1\n nosuch 1\n</zeo>\n"),
    "unknown section": (6, "unknown type name: 'nosuch'", f"{ZEO}{MEMORY}<nosuch>\n</nosuch>\n"),
    "no address": (2, "no values for 'address'", f"<zeo>\n</zeo>\n{MEMORY}"),
    "unclosed section": (2, "unclosed sections", "<zeo>\n address 1\n"),
    "nonsense": (6, "unknown directive", f"{ZEO}{MEMORY}%nonsense\n"),
    "two servers": (6, "too many instances of 'zeo'", ZEO + ZEO + MEMORY),
    "key twice": (3, "does not support multiple values", f"<zeo>\n address 1\n address 2\n</zeo>\n{MEMORY}"),
    "no port": (2, "the address 'localhost' has no port", f"<zeo>\n address localhost\n</zeo>\n{MEMORY}"),
    "bad port": (2, "above upper bound", f"<zeo>\n address localhost:77000\n</zeo>\n{MEMORY}"),
    "port in words": (2, "invalid literal", f"<zeo>\n address localhost:http\n</zeo>\n{MEMORY}"),
    "not yes or no": (3, "not a valid boolean", f"<zeo>\n address 1\n read-only maybe\n</zeo>\n{MEMORY}"),
    "time in words": (3, "soon", f"<zeo>\n address 1\n transaction-timeout soon\n</zeo>\n{MEMORY}"),
    "no time": (3, "'0' is no time", f"<zeo>\n address 1\n transaction-timeout 0\n</zeo>\n{MEMORY}"),
    "less than no time": (3, "'-1' is no", f"<zeo>\n address 1\n transaction-timeout -1\n</zeo>\n{MEMORY}"),
    "no time at all": (3, "'nan' is no", f"<zeo>\n address 1\n transaction-timeout nan\n</zeo>\n{MEMORY}"),
    "less than none": (
        3, "'-5' is negative", f"<zeo>\n address 1\n invalidation-queue-size -5\n</zeo>\n{MEMORY}",
    ),
    "undefined name": (2, "no replacement for 'NOSUCH'", f"<zeo>\n address $NOSUCH\n</zeo>\n{MEMORY}"),
    "storage without a path": (5, "no values for 'path'", f"{ZEO}<filestorage>\n</filestorage>\n"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_mistake_is_told_with_file_and_line(configured: Configured, tmp_path: Path, what: str) -> None:
    line, words, text = WRONG[what]
    with pytest.raises(ConfigurationError) as caught:
        configured(text)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'server.conf'}: line {line}: ")
    assert words in message
    assert "\n" not in message


INCOMPLETE = {
    "empty": ("no values for section type 'zeo'", ""),
    "no server": ("no values for section type 'zeo'", MEMORY),
    "no storage": ("'zodb.storage'", ZEO),
    "two storages of one name": ("two storages are named '1'", ZEO + MEMORY + MEMORY),
    "component that is not installed": ("nosuch_package", f"%import nosuch_package\n{ZEO}{MEMORY}"),
    "file that is not there": ("nosuch.conf", f"%include nosuch.conf\n{ZEO}{MEMORY}"),
}


@pytest.mark.parametrize("what", INCOMPLETE)
def test_what_is_missing_is_told_with_the_file(configured: Configured, tmp_path: Path, what: str) -> None:
    words, text = INCOMPLETE[what]
    with pytest.raises(ConfigurationError) as caught:
        configured(text)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'server.conf'}: ")
    assert words in message
    assert "\n" not in message


def test_a_file_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"can't read .*nosuch\.conf: No such file"):
        read_configuration(str(tmp_path / "nosuch.conf"))


def test_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"can't read .*: Is a directory"):
        read_configuration(str(tmp_path))


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "Data.fs"
    path.write_bytes(b"FS30" + b"\xff\xfe" * 100)
    with pytest.raises(ConfigurationError, match=r"can't read .*Data\.fs: it is no UTF-8 text"):
        read_configuration(str(path))


# FileStorage's constructor leaves what it had opened to the garbage collector when it fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_storage_that_cant_be_opened(configured: Configured, tmp_path: Path) -> None:
    path = tmp_path / "letter.txt"
    path.write_text("Dear friend, this is no data file.\n")
    options = configured(f"{ZEO}<filestorage main>\n path {path}\n</filestorage>\n")
    with pytest.raises(ConfigurationError) as caught:
        options.storages["main"]()
    message = str(caught.value)
    assert f"can't open storage 'main' of {tmp_path / 'server.conf'}" in message
    assert "Is it a storage's data file?" in message
    assert "\n" not in message


def test_a_data_file_is_looked_at_before_it_is_opened(configured: Configured, tmp_path: Path) -> None:
    """As one that is given on the command line."""
    path = tmp_path / "Data.fs"
    path.touch()
    options = configured(f"{ZEO}<filestorage>\n path {path}\n</filestorage>\n")
    with pytest.raises(ConfigurationError, match="is empty"):
        options.storages["1"]()


def test_a_data_file_that_is_to_be_made_anew(configured: Configured, tmp_path: Path) -> None:
    path = tmp_path / "Data.fs"
    path.touch()
    options = configured(f"{ZEO}<filestorage>\n path {path}\n create true\n</filestorage>\n")
    assert opened(options.storages) == {"1": str(path)}


@pytest.mark.parametrize(
    "section",
    [
        "<filestorage>\n path Data.fs\n blob-dir blobs\n</filestorage>",
        "<blobstorage>\n blob-dir blobs\n<filestorage>\n path Data.fs\n</filestorage>\n</blobstorage>",
    ],
    ids=["inside", "around"],
)
def test_a_data_file_has_its_journal_and_its_blobs(configured: Configured, section: str) -> None:
    (opener,) = configured(f"{ZEO}{section}\n").storages.values()
    engine = opener()
    assert engine.has_blobs
    assert not engine.exclusive, "commits are parallel: it is no adapted storage"
    engine.close()
    assert Path("Data.fs.journal").is_dir()
    assert Path("blobs/.staged").is_dir()


# Other storages -------------------------------------------------------------------------------------------


def test_each_storage_gets_the_engine_that_fits_it(configured: Configured, tmp_path: Path) -> None:
    storages = configured(
        f"""
        %import relstorage
        <zeo>
          address 7700
        </zeo>
        <relstorage database>
          <sqlite3>
            data-dir {tmp_path / "database"}
          </sqlite3>
        </relstorage>
        <demostorage trial>
          <filestorage>
            path {tmp_path / "Data.fs"}
          </filestorage>
        </demostorage>
        {MEMORY}
        """
    ).storages
    engines = {name: storage() for name, storage in storages.items()}
    assert {name: (engine.inline, engine.shared) for name, engine in engines.items()} == {
        "database": (False, True),
        "trial": (True, False),
        "1": (True, False),
    }
    for engine in engines.values():
        engine.close()


def test_what_a_databases_driver_raises_is_told_in_one_line(configured: Configured, tmp_path: Path) -> None:
    (tmp_path / "database").mkdir()
    (tmp_path / "database" / "main.sqlite3").write_bytes(b"no database" * 1000)
    text = f"<relstorage>\n<sqlite3>\ndata-dir {tmp_path / 'database'}\n</sqlite3>\n</relstorage>\n"
    options = configured(f"%import relstorage\n<zeo>\naddress 7700\n</zeo>\n{text}")
    with pytest.raises(ConfigurationError) as caught:
        options.storages["1"]()
    assert re.match(r"can't open storage '1' of .*: file is not a database$", str(caught.value))
