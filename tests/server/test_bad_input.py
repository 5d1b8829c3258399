"""A real server and clients that do what they should not: it says so in one line and goes on.

While a client misbehaves, another one loads and commits all the time, and notices nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ZODB.FileStorage import FileStorage
from ZODB.utils import p64

import zeoid
from tests.peers import wait_until
from tests.server.inmemory import Call
from tests.server.processes import Serving, serve_until
from tests.server.sockets import Address, Bystander, RawClient
from zeoid import limits
from zeoid.addresses import TcpAddress
from zeoid.model import MAX_TID, NO_TID
from zeoid.wire.codec import codec_for
from zeoid.wire.frames import frame

A = p64(1)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """One server for all: it must survive them."""
    folder = tmp_path_factory.mktemp("server")
    made: list[Serving] = []
    try:
        serving = serve_until(folder, made)("-h", "127.0.0.1", "-p", "0", "--memory")
        yield serving
        assert serving.stop() == 0
        assert "Traceback" not in serving.log.text()
    finally:
        for serving in made:
            serving.end()


@pytest.fixture(scope="module")
def at_work(server: Serving) -> Iterator[Bystander]:
    """Another client, the same for all."""
    with Bystander(server.address) as bystander:
        yield bystander


@pytest.fixture
def bystander(at_work: Bystander) -> Iterator[Bystander]:
    """The other client must have been served before this test, and must be served after it."""
    at_work.goes_on(1)
    yield at_work
    at_work.goes_on()


@pytest.fixture
def client(server: Serving, bystander: Bystander) -> Iterator[RawClient]:
    with RawClient(server.address) as client:
        yield client


def one_line(server: Serving, client: RawClient, *words: str) -> None:
    """The server wrote exactly one line of warning about the client, with these words."""

    def written() -> list[str]:
        return [line for line in server.lines_about(client) if not line.startswith("INFO ")]

    (line,) = wait_until(written, "a line in the log")
    for word in words:
        assert word in line
    assert len(line) < 400


# Before there is a client ---------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [b"Z4", b"M4", b"Z3101", b"M6", b"X5", b"", b"rout", b"Z5 ", b"\xff" * 60])
def test_an_answer_in_another_protocol(server: Serving, client: RawClient, answer: bytes) -> None:
    client.send_frame(answer)
    client.read_to_end()
    one_line(server, client, "dropped: protocol", "is not spoken here, only M5 and Z5")


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"\xff" * 1000,
        struct.pack(">I", 0xFFFFFFFF),
        struct.pack(">I", limits.HANDSHAKE_FRAME_BYTES + 1),
    ],
    ids=["http", "ssh", "0xff", "4 GB", "64 kB and a byte"],
)
def test_garbage_on_the_port(server: Serving, client: RawClient, garbage: bytes) -> None:
    client.send(garbage)
    client.read_to_end()
    one_line(server, client, "dropped: a message of", "bytes; the limit is 65,536")


def test_a_client_with_tls(server: Serving, client: RawClient) -> None:
    client.send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + os.urandom(32))
    client.read_to_end()
    one_line(server, client, "dropped: it wants TLS, which this server does not have")


def test_somebody_who_only_knocks(server: Serving, client: RawClient) -> None:
    """A monitor or a port scanner: no line at all."""
    client.socket.close()
    with RawClient(server.address) as other:
        other.register()
    assert server.lines_about(client) == []


def test_a_status_request(server: Serving, client: RawClient) -> None:
    client.read_frame()
    client.send_frame(b"ruok")
    status = json.loads(client.read_frame())
    assert status["1"]["connections"] == 1
    assert client.read_to_end() == b""
    assert server.lines_about(client) == []


def test_an_unknown_storage(server: Serving, client: RawClient) -> None:
    client.shake_hands()
    with pytest.raises(TypeError, match="unknown storage: 'nosuch'; this server has '1'"):
        client.call("register", "nosuch", False)
    one_line(server, client, "unknown storage: 'nosuch'; this server has '1'")
    assert client.call("register", "1", False)


# After it has registered ----------------------------------------------------------------------------------


def test_a_frame_of_four_gigabytes(server: Serving, client: RawClient) -> None:
    client.register()
    client.send(struct.pack(">I", 0xFFFFFFFF))
    client.read_to_end()
    one_line(server, client, "dropped: a message of 4,294,967,295 bytes; the limit is 268,435,456")


def test_a_method_that_does_not_exist(server: Serving, client: RawClient) -> None:
    client.register()
    with pytest.raises(TypeError, match="there is no method 'stop_server'"):
        client.call("stop_server")
    one_line(server, client, "there is no method 'stop_server'")
    assert client.call("ping") is None


def test_wrong_arguments(server: Serving, client: RawClient) -> None:
    client.register()
    with pytest.raises(TypeError, match="loadBefore: oid must be oid, not 3 bytes"):
        client.call("loadBefore", b"oid", MAX_TID)
    one_line(server, client, "loadBefore: oid must be oid, not 3 bytes")
    assert client.call("ping") is None


@pytest.mark.parametrize(
    "payload",
    [
        b"", b"\xc1", b"\x94\x01", b"\xdd\xff\xff\xff\xff", b"cos\nsystem\n(S'true'\ntR.", b"\x80\x05K\x01.",
        codec_for(b"Z5").encode(1, 0, "ping", ()), os.urandom(200),
    ],
    ids=lambda payload: repr(payload[:10]),
)  # fmt: skip
def test_a_message_that_cant_be_decoded(server: Serving, client: RawClient, payload: bytes) -> None:
    client.register()
    client.send_frame(payload)
    client.read_to_end()
    one_line(server, client, "dropped: ")


def test_a_label_with_line_breaks(server: Serving, client: RawClient) -> None:
    client.register()
    client.call("set_client_label", "me\n2026-01-01 00:00:00,000 CRITICAL everything is lost")
    client.call("ping")
    assert [line for line in server.lines if line.startswith("2026-01-01 ")] == []


def test_thousands_of_messages_in_one_segment(server: Serving, client: RawClient) -> None:
    client.register()
    calls = [client.connection.call(number, "lastTransaction", ()) for number in range(1, 5001)]
    client.send(b"".join(calls))
    answers: list[Any] = []
    while len(answers) < 5000:
        data = client.socket.recv(65536)
        assert data
        answers += [slot for slot, *_ in client.connection.receive(data) if slot is not None]
    assert answers == list(range(1, 5001))


def test_a_message_byte_by_byte(server: Serving, client: RawClient) -> None:
    client.register()
    call = Call("ping")
    message = client.connection.call(call, "ping", ())
    for position in range(len(message)):
        client.send(message[position : position + 1])
    assert client.answer(call) is None


def test_half_a_message_of_one_that_stays(server: Serving, client: RawClient, bystander: Bystander) -> None:
    client.register()
    message = client.connection.call("slot", "loadBefore", (A, MAX_TID))
    client.send(message[: len(message) // 2])
    bystander.goes_on(20)
    assert [line for line in server.lines_about(client) if not line.startswith("INFO ")] == []


def test_one_that_breaks_off_in_the_middle(server: Serving, bystander: Bystander) -> None:
    """With a reset, in every phase of a transaction: what it held is free again."""
    for phase in range(5):
        client = RawClient(server.address)
        client.register()
        if phase >= 1:
            client.one_way("tpc_begin", 1, b"", b"", {}, None, " ")
        if phase >= 2:
            client.one_way("storea", p64(77), NO_TID, b"never", 1)
        if phase >= 3:
            client.call("vote", 1)
        if phase >= 4:
            client.send(client.connection.call("slot", "tpc_abort", (1,))[:-3])
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.socket.close()
        bystander.goes_on()


def test_a_client_that_never_reads_its_replies(server: Serving, bystander: Bystander) -> None:
    """It asks for 400 megabytes and reads nothing: the server's memory hardly grows."""
    with RawClient(server.address) as writer:
        writer.register()
        size = 1_000_000
        writer.commit(A, b"x" * size, _serial_of(writer, A))
    bystander.goes_on()
    before = server.peak_memory_bytes()
    with RawClient(server.address) as client:
        client.register()
        client.send(b"".join(client.connection.call(n, "loadBefore", (A, MAX_TID)) for n in range(1, 401)))
        bystander.goes_on(20)
        assert server.peak_memory_bytes() - before < 50 * size
        # It may read after all, and gets everything.
        received = 0
        while received < 400:
            data = client.socket.recv(1024 * 1024)
            assert data
            received += sum(slot is not None for slot, *_ in client.connection.receive(data))
    assert server.peak_memory_bytes() - before < 50 * size


def test_a_client_that_sends_and_sends_and_never_reads(server: Serving, bystander: Bystander) -> None:
    """The server stops reading what it sends, so that it has to stop, too."""
    with RawClient(server.address) as client:
        client.register()
        data = b"x" * 1_000_000
        client.commit(A, data, _serial_of(client, A))
        load = client.connection.call("slot", "loadBefore", (A, MAX_TID))
        requests = load * (100_000 // len(load))
        client.socket.setblocking(False)
        writable = select.poll()
        writable.register(client.socket, select.POLLOUT)
        sent = 0
        rest = b""
        while sent < 50_000_000 and writable.poll(1000):
            rest = rest or requests
            sent += (count := client.socket.send(rest))
            rest = rest[count:]
        assert sent < 50_000_000


def _serial_of(client: RawClient, oid: bytes) -> bytes:
    try:
        serial: bytes = client.call("getTid", oid)
    except KeyError:
        return NO_TID
    return serial


def test_a_client_that_asks_for_more_slow_work_than_it_may(server: Serving, client: RawClient) -> None:
    client.register()
    calls = [client.start("undoLog", 0, -1) for _ in range(500)]
    for call in calls:
        with contextlib.suppress(TypeError):
            client.answer(call)
    problems = {str(call.problem) for call in calls if call.problem}
    assert problems <= {"undoLog: 16 requests of this connection are under way"}
    assert any(call.problem is None for call in calls)
    assert client.call("ping") is None


# With settings that a test can wait for -------------------------------------------------------------------


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Address]]:
    """Servers in this process, with the options and limits that a test wants."""
    running = []

    def start(bounds: dict[str, Any] | None = None, **options: Any) -> Address:
        for name, value in (bounds or {}).items():
            monkeypatch.setattr(limits, name, value)
        running.append(zeoid.serve(None, **options))
        address = running[-1].address
        return (address.host, address.port) if isinstance(address, TcpAddress) else address.path

    yield start
    for server in running:
        server.close()


@pytest.mark.parametrize(
    "said", ["nothing", "half a length", "half an answer", "an answer", "half of register"]
)
def test_one_that_does_not_register_is_dropped(
    embedded: Callable[..., Address], caplog: pytest.LogCaptureFixture, said: str
) -> None:
    address = embedded(handshake_timeout_s=0.2)
    register = codec_for(b"M5").encode(1, 0, "register", ("1", False))
    words = {
        "nothing": b"",
        "half a length": b"\0\0",
        "half an answer": b"\0\0\0\2M",
        "an answer": frame(b"M5"),
        "half of register": frame(b"M5") + frame(register)[:-1],
    }
    with Bystander(address) as bystander, RawClient(address) as client:
        client.send(words[said])
        client.read_to_end()
        lines = [record.getMessage() for record in caplog.records if client.name in record.getMessage()]
        assert lines == [f"{client.name} dropped: did not register within 0.2 s"]
        bystander.goes_on()


def test_one_that_has_registered_may_be_silent_for_long(embedded: Callable[..., Address]) -> None:
    address = embedded(handshake_timeout_s=0.2)
    with RawClient(address) as silent, RawClient(address) as dropped:
        silent.register()
        dropped.read_to_end()
        assert silent.call("ping") is None


def test_one_that_never_reads_its_invalidations_is_dropped(
    embedded: Callable[..., Address], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """On a unix socket, whose buffers in the system are small."""
    address = embedded({"OUTPUT_LIMIT_BYTES": 300_000}, path=str(tmp_path / "socket"))
    with RawClient(address) as deaf, RawClient(address) as writer, RawClient(address) as reader:
        for client in (deaf, reader, writer):
            client.register()
        deaf.call("set_client_label", "deaf")
        oids = [p64(number) for number in range(2000)]
        serial = NO_TID

        def is_dropped() -> bool:
            nonlocal serial
            serial = _commit_all(writer, oids, serial)
            assert reader.call("lastTransaction") == serial  # it reads what it is told
            return any("does not read what it is sent" in record.getMessage() for record in caplog.records)

        wait_until(is_dropped, "the one that does not read is dropped", 60)
        (line,) = [record.getMessage() for record in caplog.records if "dropped" in record.getMessage()]
        assert line == "deaf local client dropped: it does not read what it is sent"
        deaf.read_to_end()
        assert reader.call("server_status")["connections"] == 2


def _commit_all(writer: RawClient, oids: list[bytes], serial: bytes) -> bytes:
    """One transaction that writes many objects."""
    begin = writer.connection.one_way("tpc_begin", (1, b"", b"", {}, None, " "))
    stores = [writer.connection.one_way("storea", (oid, serial, b"x", 1)) for oid in oids]
    writer.send(begin + b"".join(stores))
    assert writer.call("vote", 1) == ()
    tid: bytes = writer.call("tpc_finish", 1)
    return tid


def test_one_that_stops_in_the_middle_of_a_transaction_is_dropped(
    embedded: Callable[..., Address], caplog: pytest.LogCaptureFixture
) -> None:
    address = embedded(transaction_timeout_s=0.5)
    with RawClient(address) as slow, RawClient(address) as other:
        slow.register()
        other.register()
        slow.prepare(A, b"never")
        assert other.prepare(A, b"in time") == ()
        assert other.call("tpc_finish", 1)
        slow.read_to_end()
        (line,) = [record for record in caplog.records if record.levelname == "CRITICAL"]
        assert line.name == "ZEO.StorageServer"
        timeout = f"({slow.name}) Transaction timeout after 0.5 seconds: it was prepared, "
        assert line.getMessage().startswith(timeout)
        assert other.call("loadBefore", A, MAX_TID)[0] == b"in time"


def test_the_data_file_is_whole_after_all_that(tmp_path: Path) -> None:
    """Bad operations in good transactions and the reverse, and then ZODB reads every record."""
    path = tmp_path / "Data.fs"
    with zeoid.serve(path) as server:
        assert isinstance(server.address, TcpAddress)
        address = (server.address.host, server.address.port)
        with Bystander(address) as bystander:
            for args in (
                (p64(5), NO_TID, b"", 1), (p64(5), NO_TID, "text", 1), (p64(5), b"", b"data", 1), (p64(5), 1),
            ):  # fmt: skip
                with RawClient(address) as client:
                    client.register()
                    client.one_way("tpc_begin", 1, b"", b"", {}, None, " ")
                    client.one_way("storea", p64(6), NO_TID, b"data", 1)
                    client.one_way("storea", *args)
                    with pytest.raises(Exception, match=r"storea|is empty"):
                        client.call("vote", 1)
            for status in ("c", "u", "\u00e9"):
                with RawClient(address) as client:
                    client.register()
                    client.one_way("tpc_begin", 1, b"", b"", {}, None, status)
                    client.one_way("storea", p64(7), NO_TID, b"data", 1)
                    with pytest.raises(TypeError, match="status"):
                        client.call("vote", 1)
            bystander.goes_on()
        committed = bystander.rounds
    Path(f"{path}.index").unlink()
    storage = FileStorage(str(path), read_only=True)
    records = [record.oid for transaction in storage.iterator() for record in transaction]
    storage.close()
    assert len(records) >= committed
    assert len(set(records)) == 1
