"""Where a server listens: nothing is open to others without TLS, unless somebody wants just that."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.certificates import Authority
from tests.server.sockets import RawClient, needs_ipv6
from tests.server.test_server import Running, Start, start
from zeoid.addresses import TcpAddress, UnixAddress, parse_address
from zeoid.config.serving import listening_address
from zeoid.engines.opening import open_memory
from zeoid.errors import ConfigurationError
from zeoid.security.tls import ServerTls
from zeoid.server import listening
from zeoid.server.server import StorageServer

__all__ = ["start"]

OPEN = [
    ":0", "0.0.0.0:0", "[::]:0", "0:0", "192.0.2.1:0", "[2001:db8::1]:0", "[::ffff:192.0.2.1]:0",
    "255.255.255.255:0",
]  # fmt: skip
LOOPBACK = ["127.0.0.1:0", "localhost:0", "127.0.0.2:0", "127.1:0", "127.255.255.254:0"]


@pytest.mark.parametrize("text", OPEN)
@pytest.mark.parametrize("parse", [parse_address, listening_address])
def test_an_address_that_others_reach_is_refused(text: str, parse: Callable[[str], Any]) -> None:
    refused(parse(text))


def refused(address: TcpAddress) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Running(StorageServer({"1": open_memory()}), address)
    assert str(caught.value).startswith(f"won't listen on {address} without TLS: ")
    assert "--insecure" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_configured_port_alone_is_every_interface() -> None:
    refused(listening_address("8100"))


@pytest.mark.parametrize("addresses", [
    ["192.0.2.1"], ["127.0.0.1", "192.0.2.1"], ["::1", "2001:db8::1"], ["fe80::1%eth0"], ["10.0.0.1"],
])  # fmt: skip
def test_a_name_one_of_whose_addresses_others_reach(
    addresses: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve(addresses, monkeypatch)
    address = TcpAddress("zoo.example", 1)
    found = asyncio.run(listening.hosts(address))
    assert found == addresses
    with pytest.raises(ConfigurationError, match="without TLS"):
        listening.refuse_open(address, found)


def resolve(addresses: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Have a name stand for addresses; the names that are asked for."""
    asked: list[str] = []

    def getaddrinfo(host: Any, port: int, *args: Any, **options: Any) -> list[Any]:
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return asked


def test_a_name_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was looked at is what is listened on: a name may stand for something else the next time."""
    asked = resolve(["127.0.0.1"], monkeypatch)
    found = asyncio.run(listening.hosts(TcpAddress("zoo.example", 1)))
    assert found == ["127.0.0.1"]
    assert asked == ["zoo.example"]
    assert not listening.is_open(found)


@pytest.mark.parametrize("text", [*LOOPBACK, pytest.param("[::1]:0", marks=needs_ipv6)])
def test_loopback(start: Start, text: str) -> None:
    running = start(parse_address(text))
    with RawClient(running.address) as client:
        client.register()


def test_whoever_wants_it_has_it(start: Start) -> None:
    running = start(TcpAddress("0.0.0.0", 0), insecure=True)
    with RawClient(("127.0.0.1", running.address[1])) as client:
        client.register()


def test_with_tls_every_address_is_good(start: Start, tmp_path: Path) -> None:
    running = start(TcpAddress("0.0.0.0", 0), tls=ServerTls(Authority(tmp_path).server()))
    with RawClient(("127.0.0.1", running.address[1])) as client:
        client.send(b"\0\0\0\x02M5")
        client.read_to_end()


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o777])
def test_a_unix_socket_is_its_owners(
    start: Start, tmp_path: Path, umask: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody else could connect to it, not even at the moment when it is made."""
    path = str(tmp_path / "socket")
    modes: list[int] = []
    chmod = os.chmod

    def watched(name: str, mode: int) -> None:
        if name == path:
            chmod(path, 0o666)
            with socket.socket(socket.AF_UNIX) as early, pytest.raises(ConnectionRefusedError):
                early.connect(path)
            modes.append(mode)
        chmod(name, mode)

    monkeypatch.setattr(os, "chmod", watched)
    before = os.umask(umask)
    try:
        start(UnixAddress(path))
    finally:
        os.umask(before)
    assert modes == [0o600]
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    with RawClient(path) as client:
        client.register()


def test_a_unix_socket_that_can_not_be_made_private(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(name: str, mode: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "chmod", fails)
    with pytest.raises(ConfigurationError, match="operation not permitted"):
        Running(StorageServer({"1": open_memory()}), UnixAddress(str(tmp_path / "socket")))
