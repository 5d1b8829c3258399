"""`zeoid serve`: how it stops, and what keeps it from starting: one line, and nothing left behind."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from ZODB.POSException import POSKeyError
from ZODB.utils import p64

from tests.peers import environment, wait_until
from tests.server.processes import Serving, on_loopback, records, wait_for_pid
from tests.server.sockets import Bystander, RawClient, commit, free_port, load
from zeoid.model import MAX_TID, NO_TID

A, B = p64(1), p64(2)
Serve = Callable[..., Serving]
Refused = Callable[..., str]


# Stopping -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_clean_stop(serve: Serve, tmp_path: Path, number: signal.Signals) -> None:
    """Clients are connected, one of them has a transaction prepared, one waits for it: status 0, and the data
    file has what was committed, and nothing else."""
    path = tmp_path / "socket"
    serving = serve("-a", "127.0.0.1:0", "-a", path, "--pid-file", "zoo.pid", "Data.fs", listeners=2)
    address = serving.address
    with RawClient(address) as holder, RawClient(address) as waiter, RawClient(str(path)) as idle:
        for client in (holder, waiter, idle):
            client.register()
        idle.commit(A, b"committed")
        holder.prepare(B, b"prepared")
        waiter.one_way("tpc_begin", 1, b"", b"", {}, None, " ")
        waiter.one_way("storea", p64(3), NO_TID, b"waiting", 1)
        waiter.start("vote", 1)
        assert serving.stop(number) == 0
        for client in (holder, waiter, idle):
            client.read_to_end()
    assert serving.lines[-1].endswith(" INFO stopped")
    assert f"INFO stopping on {number.name}" in serving.log.text()
    assert not path.exists()
    assert not (tmp_path / "zoo.pid").exists()
    assert records(tmp_path / "Data.fs") == {A: b"committed"}


def test_a_stop_in_the_middle_of_work_loses_nothing(serve: Serve, tmp_path: Path) -> None:
    """Everything that was acknowledged is there."""
    serving = serve(*on_loopback("Data.fs"))
    acknowledged = []
    with RawClient(serving.address) as client:
        client.register()
        with contextlib.suppress(OSError, EOFError):
            for number in range(1, 100_000):
                client.commit(p64(number))
                acknowledged.append(p64(number))
                if number == 20:
                    serving.process.send_signal(signal.SIGTERM)
    assert serving.wait() == 0
    found = records(tmp_path / "Data.fs")
    assert found.keys() >= set(acknowledged)
    assert len(found) <= len(acknowledged) + 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_second_signal_does_no_harm(serve: Serve, number: signal.Signals) -> None:
    """It comes while the server waits for a client to read what it was sent."""
    serving = serve(*on_loopback("--memory"))
    with RawClient(serving.address) as client:
        client.register().commit(A, b"x" * 1_000_000)
        for _ in range(20):
            client.start("loadBefore", A, MAX_TID)
        for signals in (1, 2):
            serving.process.send_signal(number)
            wait_until(
                lambda signals=signals: serving.log.text().count(f"stopping on {number.name}") == signals,
                "the server says that it stops",
                60,
            )
        client.read_to_end()
        assert serving.wait() == 0
    assert "Traceback" not in serving.log.text()


def test_a_kill_leaves_a_data_file_that_opens(serve: Serve, tmp_path: Path) -> None:
    serving = serve(*on_loopback("Data.fs"))
    with RawClient(serving.address) as client:
        tid = client.register().commit(A)
        client.prepare(B)
        serving.process.kill()
        serving.wait()
    again = serve(*on_loopback("Data.fs"))
    assert load(again.address) == (b"data", tid, None)
    with pytest.raises(POSKeyError):
        load(again.address, B)


def test_the_same_port_again_at_once(serve: Serve) -> None:
    first = serve("--memory", "-h", "127.0.0.1", "-p", free_port())
    address = first.address
    with RawClient(address) as client:
        client.register()
        assert first.stop() == 0
        second = serve("--memory", "-h", "127.0.0.1", "-p", address[1])
        assert second.address == address
        assert commit(address)


def test_a_transaction_that_is_not_finished(serve: Serve) -> None:
    """It is aborted, its client dropped, and the others go on; the line is where ZEO's users look for it."""
    serving = serve(*on_loopback("Data.fs", "--transaction-timeout", "0.5"))
    with RawClient(serving.address) as slow, Bystander(serving.address) as bystander:
        slow.register()
        slow.prepare(A, b"never")
        slow.read_to_end()
        bystander.goes_on()
    (line,) = [line for line in serving.lines if " CRITICAL " in line]
    assert line.endswith(
        f"({slow.name}) Transaction timeout after 0.5 seconds: it was prepared, "
        "and held 1 objects: 0000000000000001; a transaction of nobody: no description"
    )
    with pytest.raises(POSKeyError):
        load(serving.address)


def test_the_logger_of_a_transaction_that_is_not_finished(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "server.conf").write_text(
        """
        <zeo>
          address 127.0.0.1:0
          transaction-timeout 0.5
        </zeo>
        <mappingstorage>
        </mappingstorage>
        <eventlog>
          <logfile>
            path STDERR
            format %(name)s %(levelname)s %(message)s
          </logfile>
        </eventlog>
        """
    )
    serving = serve("-C", "server.conf")
    with RawClient(serving.address) as slow:
        slow.register().prepare(A)
        slow.read_to_end()
    start = f"ZEO.StorageServer CRITICAL ({slow.name}) Transaction timeout after 0.5 seconds: it was prepared"
    assert [line for line in serving.lines if line.startswith(start)]


# A server that does not run: one line, status 2 -----------------------------------------------------------


def test_a_port_in_use(serve: Serve, refused: Refused) -> None:
    port = serve(*on_loopback("--memory")).address[1]
    assert refused("serve", "--memory", "-h", "127.0.0.1", "-p", port) == (
        f"can't listen on 127.0.0.1:{port}: address already in use"
    )


def test_a_live_unix_socket(serve: Serve, refused_here: Refused, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    serve("--memory", "-a", path)
    assert refused_here("serve", "--memory", "-a", path) == (
        f"can't listen on {path}: another server listens there"
    )  # fmt: skip
    assert commit(str(path))


def test_a_stale_unix_socket(serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    first = serve("--memory", "-a", path)
    first.process.kill()
    first.wait()
    assert path.exists()
    serve("--memory", "-a", path)
    assert commit(str(path))


def test_a_locked_data_file(serve: Serve, refused: Refused, tmp_path: Path) -> None:
    address = serve(*on_loopback("Data.fs")).address
    assert "in use by another process" in refused("serve", *on_loopback("Data.fs"))
    assert commit(address)


def test_a_data_file_that_is_none(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("Dear friend\n" * 100)
    assert "Is it a storage's data file?" in refused("serve", *on_loopback("letter.txt"))


@pytest.mark.parametrize(
    ("path", "words"), [(".", "is a directory"), ("nosuch/Data.fs", "does not exist"), ("empty", "is empty")]
)
def test_a_path_that_cant_be_a_data_file(
    refused_here: Refused, tmp_path: Path, path: str, words: str
) -> None:
    (tmp_path / "empty").touch()
    assert words in refused_here("serve", *on_loopback(path))


def test_a_mistake_in_a_process_of_its_own(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "server.conf").write_text("<zeo>\n address 0\n nosuch 1\n</zeo>\n")
    assert refused("serve", "-C", "server.conf") == "server.conf: line 3: 'nosuch' is not a known key name"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_data_file_that_may_not_be_read(refused_here: Refused, tmp_path: Path) -> None:
    (tmp_path / "Data.fs").write_bytes(b"FS30")
    (tmp_path / "Data.fs").chmod(0)
    assert "Permission denied" in refused_here("serve", *on_loopback("Data.fs"))


def test_no_data_file(refused_here: Refused) -> None:
    assert refused_here("serve").startswith("which data file?")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("<zeo>\n address 0\n nosuch 1\n</zeo>\n", "server.conf: line 3: 'nosuch' is not a known key name"),
        ("<zeo>\n address 0\n", "server.conf: line 2: unclosed sections"),
        ("<zeo>\n address 0\n transaction-timeout 0\n</zeo>\n", "server.conf: line 3: '0' is no time"),
        ("<zeo>\n address zoo\n</zeo>\n", "server.conf: line 2: the address 'zoo' has no port"),
        ("%import nosuch\n", "server.conf: "),
        ("", "server.conf: "),
    ],
    ids=lambda value: value.split("\n")[0] or "empty",
)
def test_a_configuration_file_with_a_mistake(
    refused_here: Refused, tmp_path: Path, text: str, words: str
) -> None:
    (tmp_path / "server.conf").write_text(text)
    assert refused_here("serve", "-C", "server.conf").startswith(words)


def test_one_of_several_storages_cant_be_opened(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "server.conf").write_text(
        """
        <zeo>
          address 127.0.0.1:0
        </zeo>
        <filestorage good>
          path good.fs
        </filestorage>
        <filestorage bad>
          path bad.fs
        </filestorage>
        """
    )
    (tmp_path / "bad.fs").write_text("Dear friend\n" * 100)
    assert refused("serve", "-C", "server.conf").startswith("can't open storage 'bad' of server.conf: ")


def test_a_log_that_cant_be_written(refused_here: Refused, tmp_path: Path) -> None:
    (tmp_path / "server.conf").write_text(
        """
        <zeo>
          address 127.0.0.1:0
        </zeo>
        <mappingstorage>
        </mappingstorage>
        <eventlog>
          <logfile>
            path nosuch/server.log
          </logfile>
        </eventlog>
        """
    )
    assert "can't write the log" in refused_here("serve", "-C", "server.conf")


def test_a_pid_file_that_cant_be_written(refused_here: Refused) -> None:
    line = refused_here("serve", *on_loopback("--memory", "--pid-file", "nosuch/zoo.pid"))
    assert line == "can't write nosuch/zoo.pid: No such file or directory"


def test_a_server_that_cant_start_leaves_the_pid_file_of_the_one_that_runs(
    serve: Serve, refused_here: Refused, tmp_path: Path
) -> None:
    pid_file = tmp_path / "zoo.pid"
    serving = serve(*on_loopback("--memory", "--pid-file", pid_file))
    wait_for_pid(pid_file, serving)
    refused_here("serve", "--memory", "-h", "127.0.0.1", "-p", serving.address[1], "--pid-file", pid_file)
    assert pid_file.read_text() == f"{serving.process.pid}\n"


def test_a_pid_file_that_another_server_took_over_is_left(serve: Serve, tmp_path: Path) -> None:
    pid_file = tmp_path / "zoo.pid"
    first = serve(*on_loopback("--memory", "--pid-file", pid_file))
    wait_for_pid(pid_file, first)
    second = serve(*on_loopback("--memory", "--pid-file", pid_file))
    wait_for_pid(pid_file, second)
    assert first.stop() == 0
    assert pid_file.read_text() == f"{second.process.pid}\n"


def test_a_storage_that_fails_ends_the_server_with_status_1(serve: Serve, tmp_path: Path) -> None:
    """A component whose storage fails to commit: the log says so, and the server does not guess."""
    package = tmp_path / "failing"
    package.mkdir()
    (package / "__init__.py").write_text(FAILING_STORAGE)
    (package / "component.xml").write_text(FAILING_COMPONENT)
    (tmp_path / "server.conf").write_text(
        """
        %import failing
        <zeo>
          address 127.0.0.1:0
        </zeo>
        <failingstorage>
        </failingstorage>
        """
    )
    path = os.pathsep.join([str(tmp_path), environment()["PYTHONPATH"]])
    serving = serve("-C", "server.conf", env={"PYTHONPATH": path})
    with RawClient(serving.address) as client:
        client.register().prepare(A)
        with pytest.raises(EOFError):
            client.call("tpc_finish", 1)
    assert serving.wait() == 1
    (line,) = [line for line in serving.lines if " CRITICAL " in line]
    assert "storage '1' failed to commit: OSError(5, 'Input/output error')" in line
    assert "Traceback" not in serving.log.text()


FAILING_STORAGE = """
import errno, os
from ZODB.config import BaseConfig
from ZODB.MappingStorage import MappingStorage

class Failing(MappingStorage):
    def tpc_finish(self, transaction, func=None):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

class Section(BaseConfig):
    def open(self):
        return Failing()
"""
FAILING_COMPONENT = """
<component>
  <sectiontype name="failingstorage" datatype="failing.Section" implements="ZODB.storage"/>
</component>
"""
