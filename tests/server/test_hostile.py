"""A real server that is attacked: it serves others meanwhile, grows by no more than is stated, and forgets.

`python -m tests.hostile` has the same attacks with thousands of connections, and measures what others notice.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ZODB.POSException import StorageError
from ZODB.utils import p64

import zeoid
from tests.hostile import attacks
from tests.hostile.attacks import MEMBERS, NEWCOMERS, WITH_TLS, Attack
from tests.hostile.houses import House
from tests.peers import wait_until
from tests.server.processes import Serving, serve_until
from tests.server.sockets import Address, Bystander, RawClient
from zeoid import limits
from zeoid.addresses import TcpAddress
from zeoid.model import MAX_TID, NO_TID

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a process's memory is read from /proc")

MB = 1024 * 1024
MAX_MEMORY = 64
#: How much an attack may make the server grow. What is held in all is looked at every quarter of a second.
GROWTH = 60 * MB
GROWTH_WITH_HELD = (MAX_MEMORY + 200) * MB


@pytest.fixture(scope="module")
def houses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[bool], House]]:
    """Two servers for all, with TLS and without: they must survive everything."""
    made: list[Serving] = []
    known: dict[bool, House] = {}

    def house(tls: bool) -> House:
        if tls not in known:
            folder = tmp_path_factory.mktemp("server")
            options = "--max-memory", MAX_MEMORY, "--max-blob", 4, "--transaction-timeout", 1
            known[tls] = House(folder, serve_until(folder, made), *options, tls=tls)
        return known[tls]

    try:
        yield house
        for serving in made:
            assert serving.stop() == 0
            assert "Traceback" not in serving.log.text()
    finally:
        for serving in made:
            serving.end()


def attacked(house: House, attack: Attack, count: int, growth: int = GROWTH, **options: Any) -> None:
    """Others are served meanwhile, also those who come later; and nothing is left when it is over."""
    serving = house.serving
    with house.bystander() as bystander:
        bystander.goes_on(1)
        files = serving.files()
        before = serving.forget_peak_memory()
        with attack(house.attacker, count, **options):
            bystander.goes_on(10)
            with house.target("alice").register() as another:
                assert another.call("loadBefore", attacks.LARGE[1], MAX_TID)[0] == attacks.RECORD
        bystander.goes_on(3)
        assert serving.peak_memory_bytes() - before < growth
        # A file more or less: a journal's next segment, a timer's.
        wait_until(lambda: serving.files() <= files + 5, "it has closed all connections", 30)
        wait_until(lambda: _connections(house) <= 2, "it knows nothing of them any more", 30)


def _connections(house: House) -> int:
    with house.target("alice").register() as client:
        found: int = client.call("server_status")["connections"]
        return found


MANY = {"half open": 400, "half a handshake": 400, "unregistered": 300, "garbage": 2}
HELD = {"long messages": 12, "never voted": 8}


@pytest.mark.parametrize("name", NEWCOMERS)
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_those_that_are_nobody(houses: Callable[[bool], House], name: str, tls: bool) -> None:
    attacked(houses(tls), NEWCOMERS[name], MANY[name])


@pytest.mark.parametrize("name", WITH_TLS)
def test_those_that_only_want_to_be_let_in(houses: Callable[[bool], House], name: str) -> None:
    attacked(houses(True), WITH_TLS[name], 2)


@pytest.mark.parametrize("name", MEMBERS)
def test_those_that_have_registered(houses: Callable[[bool], House], name: str) -> None:
    if name in HELD:
        sizes = {"size_bytes": 48 * MB} if name == "long messages" else {}
        attacked(houses(False), MEMBERS[name], HELD[name], GROWTH_WITH_HELD, **sizes)
    else:
        attacked(houses(False), MEMBERS[name], 2)


def test_byte_by_byte_over_tls(houses: Callable[[bool], House]) -> None:
    attacked(houses(True), MEMBERS["byte by byte"], 9)


def test_a_blob_that_is_too_large(houses: Callable[[bool], House]) -> None:
    house = houses(False)
    with house.attacker.register() as client:
        client.one_way("tpc_begin", 1, b"", b"", {}, None, " ")
        client.one_way("storea", p64(40_000), NO_TID, b"record", 1)
        client.one_way("storeBlobStart")
        for _ in range(100):
            client.one_way("storeBlobChunk", bytes(59_000))
        client.one_way("storeBlobEnd", p64(40_000), NO_TID, b"record", 1)
        with pytest.raises(
            StorageError, match="larger than 4,194,304 bytes, the most that this server takes"
        ):
            client.call("vote", 1)
        assert client.call("ping") is None
    staged = house.folder / "blobs" / ".staged"
    wait_until(lambda: not staged.exists() or not list(staged.iterdir()), "nothing is left of it")


def test_a_flood_of_bad_connections_does_not_fill_the_logs(houses: Callable[[bool], House]) -> None:
    house = houses(True)
    lines = len(house.serving.lines)
    with house.bystander() as bystander:
        for _ in range(2 * limits.REFUSALS_TOLD_PER_ADDRESS + 50):
            with contextlib.suppress(OSError), house.attacker.tcp() as sock:
                sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
                while sock.recv(100):
                    pass
        bystander.goes_on(1)
    # They are of one minute, or of two.
    told = [line for line in house.serving.lines[lines:] if "refused: " in line or "dropped: " in line]
    assert len(told) <= 2 * limits.REFUSALS_TOLD_PER_ADDRESS


# With settings that a test can wait for -------------------------------------------------------------------


@pytest.fixture
def embedded() -> Iterator[Callable[..., Address]]:
    """Servers in this process."""
    running = []

    def start(**options: Any) -> Address:
        running.append(zeoid.serve(None, **options))
        address = running[-1].address
        assert isinstance(address, TcpAddress)
        return address.host, address.port

    yield start
    for server in running:
        server.close()


@pytest.mark.parametrize("option", ["max_connections", "max_connections_each"])
def test_more_connections_than_there_may_be(embedded: Callable[..., Address], option: str) -> None:
    address = embedded(**{option: 2})
    with RawClient(address) as first, RawClient(address) as second, RawClient(address) as third:
        first.register()
        second.register()
        with pytest.raises(StorageError, match=r"connections, and (takes no|may have no) more"):
            third.register()
        assert third.read_to_end() == b""
        assert first.call("ping") is second.call("ping") is None
        first.socket.close()

        def gets_in() -> bool:
            with RawClient(address) as later, contextlib.suppress(StorageError):
                later.register()
                return True
            return False

        wait_until(gets_in, "there is a place again")
        assert second.call("ping") is None


def test_one_that_is_silent_is_closed(
    embedded: Callable[..., Address], caplog: pytest.LogCaptureFixture
) -> None:
    address = embedded(idle_s=1.0)
    with Bystander(address) as bystander, RawClient(address) as silent:
        silent.register()
        silent.read_to_end()  # invalidations, up to the end
        (line,) = [each.getMessage() for each in caplog.records if "dropped" in each.getMessage()]
        assert line.startswith(f"{silent.name} dropped: it has said nothing for ")
        bystander.goes_on()


def test_whoever_sends_byte_by_byte_gains_no_time(embedded: Callable[..., Address]) -> None:
    address = embedded(handshake_timeout_s=0.5)
    with Bystander(address) as bystander, RawClient(address) as dripping:
        dripping.send(b"\0\0\xff\0")
        with contextlib.suppress(OSError):
            while True:
                dripping.send(b"M")
                bystander.goes_on(1)
        bystander.goes_on()


def test_data_files_are_whole_after_all_that(tmp_path: Path) -> None:
    """What was begun by those who were dropped is not there."""
    made: list[Serving] = []
    try:
        house = House(tmp_path, serve_until(tmp_path, made), "--max-memory", 8, tls=False)
        with house.bystander() as bystander, attacks.never_voted(house.attacker, 2):
            bystander.goes_on(5)
            assert "bytes are held for it, and " in house.serving.log.text()
        assert house.serving.stop() == 0
    finally:
        for serving in made:
            serving.end()
    with zeoid.serve(tmp_path / "Data.fs") as again:
        assert isinstance(again.address, TcpAddress)
        with RawClient((again.address.host, again.address.port)) as client:
            client.register()
            with pytest.raises(KeyError):
                client.call("getTid", p64(20_000))
