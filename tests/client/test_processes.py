"""Processes with an open storage: they fork, and they end without closing it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ZODB
from ZODB.POSException import ReadOnlyError

import zeoid
from tests.client.programs.forking import CHILDS, PARENTS
from tests.client.scenes import OID, OTHER, T1, T2, T3, Scene
from tests.peers import die_with_parent, environment
from zeoid.testing import ScriptedServer

#: Long enough for a slow machine to start Python. A storage's own deadlines are longer.
DEADLINE_S = 25.0
ROOT = Path(__file__).parents[2]


@contextmanager
def program(name: str, *args: str) -> Iterator[subprocess.Popen[str]]:
    """A program of `tests.client.programs`, running; it is ended in any case."""
    process = subprocess.Popen(
        [*die_with_parent(), sys.executable, "-m", f"tests.client.programs.{name}", *args],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def written(address: object) -> str:
    """As on a command line."""
    if isinstance(address, tuple):
        return f"{address[0]}:{address[1]}"
    return str(address)


def test_a_child_has_a_connection_of_its_own_and_the_parent_goes_on(scene: Scene) -> None:
    """A call of the parent's is under way while it forks: its reply comes to the parent, on the connection
    that the child must not touch.
    """
    server = scene.server(timeout_s=DEADLINE_S)
    with program("forking", written(server.address)) as process:
        parents = server.accept()
        parents.welcome(T1)
        call = parents.expect("getTid")
        assert call.args == (PARENTS,)
        assert process.stdin is not None
        process.stdin.write("fork\n")
        process.stdin.flush()
        childs = server.accept()
        childs.welcome(T1)
        asked = childs.expect("getTid")
        assert asked.args == (CHILDS,)
        childs.answer(asked, T3)
        assert childs.expect_end() == []
        parents.answer(call, T2)  # after the child is gone
        parents.answer(parents.expect("ping"), None)
        assert parents.expect_end() == []
        output, errors = process.communicate(timeout=DEADLINE_S)
    assert output.splitlines() == [
        f"child knows {T1.hex()}",
        f"child got {T3!r}",
        "child ended with 0",
        f"parent's thread got {[T2]}",
        "parent lost []",
    ]
    assert (process.returncode, errors) == (0, "")


def test_a_child_does_not_wait_for_what_its_parents_threads_were_doing(scene: Scene) -> None:
    """At the fork one thread applies an invalidation, one waits for object ids, one for its vote. None of
    them is there in the child. The invalidation that was half applied is told there in full.
    """
    server = scene.server(timeout_s=DEADLINE_S)
    with program("forking_midway", written(server.address)) as process:
        parents = server.accept()
        parents.welcome(T1)
        calls = {parents.expect("new_oids", "tpc_begin", "vote").name for _ in range(3)}
        assert calls == {"new_oids", "tpc_begin", "vote"}
        parents.send(parents.invalidation(T2, [OID]))
        childs = server.accept()
        childs.welcome(T2, missed=(T2, [OID]))
        childs.answer(childs.expect("ping"), None)
        childs.answer(childs.expect("new_oids"), [OTHER])
        for name in ("tpc_begin", "storea"):
            childs.expect(name)
        childs.answer(childs.expect("vote"), [])
        childs.answer(childs.expect("tpc_finish"), T3)
        assert childs.expect_end() == []
        assert parents.expect_end() == []
        output, errors = process.communicate(timeout=DEADLINE_S)
    assert output.splitlines() == [
        f"child knows {T1.hex()}",
        f"child is told of {[OID]}",
        f"child knows {T2.hex()}",
        "child has 1 socket",
        f"child committed {T3.hex()}",
        "parent's thread ended with Disconnected",
        "parent's thread ended with Disconnected",
    ]
    assert (process.returncode, errors) == (0, "")


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """Of a server with a database."""
    ZODB.DB(str(tmp_path / "Data.fs")).close()
    with zeoid.serve(tmp_path / "Data.fs") as server:
        yield written(server.address)


def test_forking_while_threads_read(address: str) -> None:
    with program("forking_under_load", address) as process:
        output, errors = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, errors) == (0, ""), output


@pytest.mark.parametrize("how", ["connected", "database"])
def test_a_process_that_never_closes_its_storage_ends_by_itself(address: str, how: str) -> None:
    ends_by_itself(how, address)


def test_a_process_that_never_got_a_connection_ends_by_itself(scene: Scene) -> None:
    server = scene.server()
    server.stop_listening()
    ends_by_itself("not connected", written(server.address))


def test_a_process_with_a_call_under_way_ends_by_itself(scene: Scene) -> None:
    server = scene.server(timeout_s=DEADLINE_S)
    with program("unclosed", "call under way", written(server.address)) as process:
        connection = server.accept()
        connection.welcome(T1)
        connection.expect("loadSerial")
        output, errors = process.communicate("go on\n", timeout=DEADLINE_S)
    assert (process.returncode, output, errors) == (0, "done\n", "")


def test_a_process_that_looks_for_a_writer_ends_by_itself(scene: Scene) -> None:
    server = scene.server(timeout_s=DEADLINE_S)
    with program("unclosed", "read-only fallback", written(server.address)) as process:
        only_readable(server)
        output, errors = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, output) == (0, "done\n")
    assert "Traceback" not in errors


def only_readable(server: ScriptedServer) -> None:
    connection = server.accept()
    connection.offer()
    connection.send(connection.fault(connection.expect("register"), ReadOnlyError()))
    connection.answer(connection.expect("register"), T1)
    connection.answer(connection.expect("get_info"), {})


def ends_by_itself(how: str, address: str) -> None:
    with program("unclosed", how, address) as process:
        output, errors = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, output) == (0, "done\n")
    assert "Traceback" not in errors
