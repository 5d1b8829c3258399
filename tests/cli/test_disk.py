"""`zeoid serve` on a disk that is full, or fails: what clients are told, and what is in the file after."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from ZODB.POSException import POSKeyError, StorageError
from ZODB.utils import p64

from tests.peers import environment
from tests.server.processes import Serving, on_loopback, records
from tests.server.sockets import RawClient, load
from zeoid.model import MAX_TID, NO_TID

resource = pytest.importorskip("resource")

A, B, C = p64(1), p64(2), p64(3)
MIB = 1024 * 1024
Serve = Callable[..., Serving]


# A disk that is full --------------------------------------------------------------------------------------


def limit_files(serving: Serving, size_bytes: int) -> None:
    """From now on this server can't write files that are larger."""
    resource.prlimit(serving.process.pid, resource.RLIMIT_FSIZE, (size_bytes, size_bytes))


def prepare_many(client: RawClient, count: int, first: int = 1) -> None:
    """A transaction of *count* new objects of 1 MiB each, up to its vote's answer."""
    client.one_way("tpc_begin", 1, b"", b"", {}, None, " ")
    for number in range(first, first + count):
        client.one_way("storea", p64(number), NO_TID, b"x" * MIB, 1)
    assert client.call("vote", 1) == ()


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="no limits for another process here")
def test_a_full_disk(serve: Serve, tmp_path: Path) -> None:
    """The vote says so, nothing is stored, nothing stays locked, and what there is room for is committed."""
    serving = serve(*on_loopback("Data.fs"))
    with RawClient(serving.address) as client, RawClient(serving.address) as other:
        client.register()
        other.register()
        limit_files(serving, 20 * MIB)
        for _ in range(2):
            with pytest.raises(StorageError, match=r"no room for a transaction of 25,.* bytes: File") as told:
                prepare_many(client, 24)
            assert told.type is StorageError
        with pytest.raises(POSKeyError):
            client.call("loadBefore", A, MAX_TID)
        assert client.call("server_status")["active_txns"] == 0
        # A good deal of the room, so that none can be reserved ahead; then little ones.
        prepare_many(client, 13)
        client.call("tpc_finish", 1)
        serials = {A: client.call("getTid", A)}
        for number in range(10):
            serials[A] = other.commit(A, b"%d" % number, serials[A])
        with pytest.raises(StorageError, match="no room"):
            prepare_many(client, 13, first=50)
        tid = other.commit(p64(100))
        assert client.call("loadBefore", p64(100), MAX_TID) == (b"data", tid, None)
    assert serving.stop() == 0
    found = records(tmp_path / "Data.fs")
    assert found.keys() == {p64(100), *(p64(number) for number in range(1, 14))}
    assert (found[A], found[p64(100)]) == (b"9", b"data")


# A disk that fails ----------------------------------------------------------------------------------------

#: Python imports a module of this name as it starts.
FAILING_SYNC = """
import errno, os

def failing(sync):
    def call(fd):
        if os.path.exists({trigger!r}):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return sync(fd)
    return call

os.fsync = failing(os.fsync)
if hasattr(os, "fdatasync"):
    os.fdatasync = failing(os.fdatasync)
"""


@pytest.fixture
def trigger(tmp_path: Path) -> Path:
    """When this file exists, no sync succeeds in servers that are started with `failing_environment`."""
    trigger = tmp_path / "fail"
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "sitecustomize.py").write_text(FAILING_SYNC.format(trigger=str(trigger)))
    return trigger


def failing_environment(trigger: Path) -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join([str(trigger.parent / "start"), environment()["PYTHONPATH"]])}


def critical(serving: Serving) -> str:
    (line,) = [line for line in serving.lines if " CRITICAL " in line]
    return line


@pytest.mark.parametrize("clients", [1, 2], ids=["alone", "in a thread"])
def test_a_sync_that_fails_ends_the_server_with_status_1(
    serve: Serve, tmp_path: Path, trigger: Path, clients: int
) -> None:
    """It must not guess what is on the disk. No finish is answered; what was answered before is there."""
    serving = serve(*on_loopback("Data.fs"), env=failing_environment(trigger))
    with RawClient(serving.address) as client, RawClient(serving.address) as other:
        client.register()
        acknowledged = client.commit(A)
        if clients > 1:
            other.register().prepare(C)
        client.prepare(B, id=1)
        client.prepare(p64(4), id=2)
        trigger.touch()
        for id in (1, 2):
            client.start("tpc_finish", id)
        # Whatever else they are told, such as a size: no answer, and no invalidation.
        unread = client.read_to_end()
        heard = [name for _, _, name, _ in client.connection.receive(unread)]
        if clients > 1:
            heard += [name for _, _, name, _ in other.connection.receive(other.read_to_end())]
        assert set(heard) <= {"info"}
    assert serving.wait() == 1
    assert "storage '1' failed to commit: OSError(5, 'Input/output error')" in critical(serving)
    assert "the server stops" in critical(serving).lower()
    assert "Traceback" not in serving.log.text()
    trigger.unlink()
    again = serve(*on_loopback("Data.fs"))
    assert load(again.address) == (b"data", acknowledged, None)
    with pytest.raises(POSKeyError):
        load(again.address, C)


def test_a_sync_that_fails_in_the_background_ends_the_server_with_status_1(
    serve: Serve, tmp_path: Path, trigger: Path
) -> None:
    """A new block of object ids could not be marked as handed out: the client that asked for it is told, and
    nothing more is written."""
    serving = serve(*on_loopback("Data.fs"), env=failing_environment(trigger))
    with RawClient(serving.address) as client:
        acknowledged = client.register().commit(A)
        trigger.touch()
        with pytest.raises(Exception, match="Input/output error"):
            client.call("new_oids", 100)
        client.read_to_end()
    assert serving.wait() == 1
    assert "storage '1' failed: OSError: [Errno 5] Input/output error" in critical(serving)
    trigger.unlink()
    again = serve(*on_loopback("Data.fs"))
    assert load(again.address) == (b"data", acknowledged, None)
