"""`zeoid serve`: its options, and real servers that are started with them, used and stopped."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ZODB.POSException import ReadOnlyError
from ZODB.utils import p64

from tests.peers import wait_until
from tests.server.processes import Serving, on_loopback, records, wait_for_pid
from tests.server.sockets import RawClient, commit, free_port, load, needs_ipv6
from zeoid.addresses import DEFAULT_PORT, TcpAddress, UnixAddress
from zeoid.addresses import Address as Listening
from zeoid.cli import parser
from zeoid.cli.serve import options
from zeoid.config.serving import ServingOptions
from zeoid.errors import ConfigurationError
from zeoid.model import MAX_TID

A, B = p64(1), p64(2)
Serve = Callable[..., Serving]
Refused = Callable[..., str]


# What the options mean ------------------------------------------------------------------------------------


def given(*arguments: Any) -> ServingOptions:
    return options(parser().parse_args(["serve", *map(str, arguments)]))


@pytest.mark.parametrize(
    ("arguments", "addresses"),
    [
        ([], [TcpAddress("localhost", DEFAULT_PORT)]),
        (["-p", "7700"], [TcpAddress("localhost", 7700)]),
        (["-p", "0"], [TcpAddress("localhost", 0)]),
        (["-h", "::1"], [TcpAddress("::1", DEFAULT_PORT)]),
        (["--host", "zoo", "--port", "7700"], [TcpAddress("zoo", 7700)]),
        (["-a", ":7700"], [TcpAddress("", 7700)]),
        (["-a", "[::1]:7700", "-a", "/run/zoo"], [TcpAddress("::1", 7700), UnixAddress("/run/zoo")]),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_addresses(arguments: list[str], addresses: list[Listening]) -> None:
    assert given("--memory", *arguments).addresses == tuple(addresses)


def test_a_blob_directory_is_in_the_configuration_file(tmp_path: Path) -> None:
    path = tmp_path / "zoo.conf"
    path.write_text("<zeo>\naddress 7700\n</zeo>\n<mappingstorage>\n</mappingstorage>\n")
    with pytest.raises(ConfigurationError, match="blob directories: leave them out"):
        given("-C", path, "--blob-dir", "blobs")


def test_other_options() -> None:
    found = given(
        "--memory", "--read-only", "--msgpack", "--transaction-timeout", "2.5", "--pid-file", "zoo.pid",
        "--resolve-conflicts",
    )  # fmt: skip
    assert (found.read_only, found.offer, found.transaction_timeout_s, found.pid_file) == (
        True, "M5", 2.5, Path("zoo.pid"),
    )  # fmt: skip
    assert found.resolve_conflicts


def test_what_is_not_given_is_as_documented() -> None:
    found, default = given("--memory"), ServingOptions()
    for name in (
        "read_only", "offer", "transaction_timeout_s", "pid_file", "invalidation_log_transactions",
        "resolve_conflicts",
    ):  # fmt: skip
        assert getattr(found, name) == getattr(default, name)


@pytest.fixture
def configuration(tmp_path: Path) -> Path:
    path = tmp_path / "server.conf"
    path.write_text(
        """
        <zeo>
          address 127.0.0.1:0
          transaction-timeout 7
          pid-filename conf.pid
        </zeo>
        <mappingstorage zoo>
        </mappingstorage>
        """
    )
    return path


def test_a_configuration_file(configuration: Path) -> None:
    found = given("-C", configuration)
    assert found.addresses == (TcpAddress("127.0.0.1", 0),)
    assert list(found.storages) == ["zoo"]
    assert (found.transaction_timeout_s, found.pid_file) == (7, Path("conf.pid"))


def test_options_win_over_the_configuration_file(configuration: Path) -> None:
    found = given(
        "-C", configuration, "-p", 7700, "--transaction-timeout", 9, "--pid-file", "x.pid",
        "--msgpack", "--read-only", "--resolve-conflicts",
    )  # fmt: skip
    assert found.addresses == (TcpAddress("localhost", 7700),)
    assert found.resolve_conflicts
    assert (found.transaction_timeout_s, found.pid_file, found.offer, found.read_only) == (
        9, Path("x.pid"), "M5", True,
    )  # fmt: skip
    assert list(found.storages) == ["zoo"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["Data.fs", "--memory"], "a data file or --memory, not both"),
        (["--memory", "-a", "localhost:1", "-p", "2"], "not both"),
        (["--memory", "-a", "localhost:1", "-h", "zoo"], "not both"),
        (["--memory", "-a", "localhost"], "'localhost' is no address"),
        (["--memory", "-a", "localhost:99999"], "no address"),
        (["--memory", "-a", "::1:7700"], "put an IPv6 address in brackets"),
        (["-C", "nosuch.conf"], "can't read nosuch.conf"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_contradict_each_other(arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        given(*arguments)


@pytest.mark.parametrize("more", [["Data.fs"], ["--memory"]], ids=" ".join)
def test_a_configuration_file_and_a_storage(configuration: Path, more: list[str]) -> None:
    with pytest.raises(ConfigurationError, match="the storages are in the configuration file"):
        given("-C", configuration, *more)


# A server that runs ---------------------------------------------------------------------------------------


def test_a_data_file_is_made_and_kept(serve: Serve, tmp_path: Path) -> None:
    first = serve(*on_loopback("Data.fs"))
    tid = commit(first.address)
    assert first.stop() == 0
    second = serve(*on_loopback("Data.fs"))
    assert load(second.address) == (b"data", tid, None)


def test_the_log_says_what_happens(serve: Serve) -> None:
    serving = serve(*on_loopback("Data.fs"))
    with RawClient(serving.address) as client:
        client.register()
        client.call("set_client_label", "zoo keeper")
    assert serving.stop() == 0
    times = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ")
    assert all(times.match(line) for line in serving.lines)
    assert [times.sub("", line) for line in serving.lines] == [
        "INFO storage '1': Data.fs",
        f"INFO listening on 127.0.0.1:{serving.address[1]}",
        f"INFO {client.name} connected to storage '1' for writing, protocol M5",
        f"INFO {client.name} is labelled zoo keeper",
        f"INFO zoo keeper {client.name} disconnected",
        "INFO stopping on SIGTERM",
        "INFO stopped",
    ]


def test_quiet(serve: Serve, tmp_path: Path) -> None:
    """There is no line that says where it listens, so the test must know."""
    path = tmp_path / "socket"
    serving = serve("--quiet", "--memory", "-a", path, listeners=0)
    wait_until(path.exists, "the socket is there", 60)
    with RawClient(str(path)) as client:
        client.register()
        with pytest.raises(TypeError):
            client.call("nosuch")
    assert serving.stop() == 0
    assert [line.split(" ", 2)[2] for line in serving.lines] == [
        "WARNING local client: there is no method 'nosuch'"
    ]


def test_memory(serve: Serve, tmp_path: Path) -> None:
    serving = serve(*on_loopback("--memory"))
    assert commit(serving.address)
    assert serving.stop() == 0
    assert list(tmp_path.iterdir()) == []


def test_read_only(serve: Serve) -> None:
    first = serve(*on_loopback("Data.fs"))
    tid = commit(first.address)
    assert first.stop() == 0
    serving = serve(*on_loopback("--read-only", "Data.fs"))
    with RawClient(serving.address) as client:
        client.shake_hands()
        with pytest.raises(ReadOnlyError):
            client.call("register", "1", False)
        assert client.call("register", "1", True) == tid
        assert client.call("loadBefore", A, MAX_TID) == (b"data", tid, None)
        with pytest.raises(ReadOnlyError):
            client.call("new_oids", 1)


def test_msgpack_is_offered(serve: Serve) -> None:
    with RawClient(serve(*on_loopback("--memory", "--msgpack")).address) as client:
        assert client.read_frame() == b"M5"
    with RawClient(serve(*on_loopback("--memory")).address) as client:
        assert client.read_frame() == b"Z5"


def test_several_addresses(serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    serving = serve("--memory", "-a", "127.0.0.1:0", "-a", path, "-a", "127.0.0.1:0", listeners=3)
    first, second, third = serving.addresses
    assert second == str(path)
    tid = commit(first)
    assert load(second) == load(third) == (b"data", tid, None)
    assert serving.stop() == 0
    assert not path.exists()


@needs_ipv6
def test_ipv6(serve: Serve) -> None:
    serving = serve("--memory", "-h", "::1", "-p", "0")
    assert serving.address[0] == "::1"
    assert commit(serving.address)


def test_the_name_localhost(serve: Serve) -> None:
    """Whatever it means on this machine, what the log says can be connected to."""
    serving = serve("--memory", "-p", free_port())
    for address in serving.addresses:
        assert commit(address, p64(hash(address) % 1000 + 1))


def test_the_data_file_of_a_zope_instance(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "zope.conf").touch()
    (tmp_path / "var").mkdir()
    serving = serve(*on_loopback())
    tid = commit(serving.address)
    assert serving.stop() == 0
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    serving = serve(*on_loopback(), cwd=elsewhere, env={"INSTANCE_HOME": str(tmp_path)})
    assert load(serving.address) == (b"data", tid, None)


def test_a_configuration_file_with_several_storages(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "server.conf").write_text(
        """
        %define FILES files
        <zeo>
          address 127.0.0.1:0
          pid-filename server.pid
        </zeo>
        <filestorage main>
          path $FILES/main.fs
        </filestorage>
        <mappingstorage temporary>
        </mappingstorage>
        <eventlog>
          level info
          <logfile>
            path STDERR
            format %(levelname)s | %(message)s
          </logfile>
        </eventlog>
        """
    )
    (tmp_path / "files").mkdir()
    serving = serve("-C", "server.conf")
    for storage in ("main", "temporary"):
        assert commit(serving.address, storage=storage)
    wait_for_pid(tmp_path / "server.pid", serving)
    assert serving.stop() == 0
    assert serving.lines[0] == "INFO | storage 'main': files/main.fs"
    assert not (tmp_path / "server.pid").exists()
    assert records(tmp_path / "files" / "main.fs") == {A: b"data"}
