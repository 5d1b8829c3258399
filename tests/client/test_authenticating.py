"""A client with a token: when it shows it, to whom it does not, and what it makes of a refusal."""

from __future__ import annotations

from pathlib import Path

import pytest
from ZODB.POSException import StorageError

from tests.client.scenes import DEADLINE_S, GRACE_S, T1, Scene, Task, welcomed
from tests.peers import wait_until
from zeoid import ClientStorage, limits, serve
from zeoid.errors import ClientError, ConfigurationError, Disconnected, Forbidden
from zeoid.testing import ScriptedConnection, ScriptedServer

TOKEN = "zeoid_reports_" + "s3cret-" * 6 + "A"


@pytest.fixture
def server(scene: Scene, tmp_path: Path) -> ScriptedServer:
    return scene.server(path=str(tmp_path / "socket"))


def authenticate(connection: ScriptedConnection) -> None:
    connection.offer()
    call = connection.expect("authenticate")
    assert (call.args, call.one_way) == ((TOKEN,), False)
    connection.answer(call, "token:reports")


def test_the_token_is_shown_before_anything_else(scene: Scene, server: ScriptedServer) -> None:
    scene.storage(server, token=TOKEN)
    connection = server.accept()
    authenticate(connection)
    assert connection.expect("register").args == ("1", False)


def test_it_is_shown_on_every_connection(scene: Scene, server: ScriptedServer) -> None:
    scene.storage(server, token=TOKEN)
    for _ in range(3):
        connection = server.accept()
        authenticate(connection)
        connection.close()


@pytest.mark.parametrize("token", [None, ""])
def test_without_a_token_nothing_is_shown(scene: Scene, server: ScriptedServer, token: str | None) -> None:
    storage = scene.storage(server, token=token)
    welcomed(storage, server, T1)
    assert storage.is_connected()


def test_it_never_leaves_in_the_clear(scene: Scene) -> None:
    server = scene.server()
    storage = scene.storage(server, token=TOKEN)
    connection = server.accept()
    connection.offer()
    assert connection.expect_end() == []
    with pytest.raises(ClientError, match="this connection is not encrypted") as caught:
        storage._link.wait(DEADLINE_S)
    assert not isinstance(caught.value, Disconnected)
    assert TOKEN not in str(caught.value)


def test_a_refused_token(scene: Scene, server: ScriptedServer, caplog: pytest.LogCaptureFixture) -> None:
    opening = Task(ClientStorage, server.address, token=TOKEN, wait_timeout=DEADLINE_S)
    connection = server.accept()
    connection.offer()
    call = connection.expect("authenticate")
    connection.send(connection.fault(call, Forbidden("the token 'reports' was revoked")))
    problem = opening.outcome()
    assert type(problem) is Forbidden
    assert isinstance(problem, StorageError)
    assert str(problem) == f"{server.address} refused the token: the token 'reports' was revoked"
    assert connection.expect_end() == []
    assert TOKEN not in caplog.text


def test_a_refusal_is_not_tried_again_at_once(
    scene: Scene, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "RECONNECT_FIRST_S", 1000.0)
    scene.storage(server, token=TOKEN)
    connection = server.accept()
    connection.offer()
    call = connection.expect("authenticate")
    connection.send(connection.fault(call, Forbidden("no")))
    connection.expect_end()
    with pytest.raises(AssertionError, match="nobody connected"):
        server.accept(GRACE_S)


def test_a_client_goes_on_trying_after_a_refusal(scene: Scene, server: ScriptedServer) -> None:
    storage = scene.storage(server, token=TOKEN)
    connection = server.accept()
    connection.offer()
    call = connection.expect("authenticate")
    connection.send(connection.fault(call, Forbidden("no")))
    connection = server.accept()
    authenticate(connection)
    register = connection.expect("register")
    connection.send(connection.fault(register, Forbidden("no")))
    with pytest.raises(Forbidden):
        storage._link.wait(DEADLINE_S)
    connection = server.accept()
    authenticate(connection)


def test_a_server_that_has_no_such_method(scene: Scene, server: ScriptedServer) -> None:
    opening = Task(ClientStorage, server.address, token=TOKEN, wait_timeout=DEADLINE_S)
    connection = server.accept()
    connection.offer()
    call = connection.expect("authenticate")
    connection.send(connection.fault(call, TypeError("there is no method 'authenticate'")))
    problem = opening.outcome()
    assert isinstance(problem, ClientError)
    assert f"{server.address} knows no tokens: leave the token out" in str(problem)


def test_a_server_that_closes_the_connection_on_it(
    scene: Scene, server: ScriptedServer, caplog: pytest.LogCaptureFixture
) -> None:
    """As ZEO's does on every method that it does not know."""
    scene.storage(server, token=TOKEN, coding="Z5")
    connection = server.accept()
    connection.offer()
    connection.expect("authenticate")
    connection.close()
    said = f"{server.address} closed the connection when it was shown a token"
    wait_until(lambda: said in caplog.text, "the reason in the log", deadline_s=DEADLINE_S)


@pytest.mark.parametrize("token", [b"bytes", 7, "ä" * 10, "x" * (limits.TOKEN_CHARACTERS + 1)], ids=repr)
def test_what_can_not_be_a_token(token: object) -> None:
    with pytest.raises(ConfigurationError) as caught:
        ClientStorage("localhost:1", token=token)  # type: ignore[arg-type]
    assert str(token) not in str(caught.value)


def test_what_is_not_in_the_clear(server: ScriptedServer, scene: Scene) -> None:
    storage = scene.storage(server)
    welcomed(storage, server, T1)
    channel = storage._link.ready
    assert channel is not None
    assert channel.encrypted
    storage, _ = scene.connected()
    channel = storage._link.ready
    assert channel is not None
    assert not channel.encrypted


def test_a_real_server_through_a_unix_socket(tmp_path: Path) -> None:
    """Whoever is trusted may show a token, and need not."""
    with serve(None, path=str(tmp_path / "socket")) as server:
        storage = ClientStorage(str(tmp_path / "socket"), token=TOKEN)
        try:
            assert len(storage.new_oid()) == 8
        finally:
            storage.close()
        assert server.address
