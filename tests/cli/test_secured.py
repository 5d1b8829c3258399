"""The tools against servers with TLS: what gets through, and how each refusal is told, once on each side."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.certificates import Authority
from tests.engines.datafiles import record
from tests.peers import environment, wait_until
from tests.server.processes import Serving, command, serve_until
from tests.server.sockets import RawClient
from zeoid.security import tokens

#: A refusal takes no longer; a client without TLS says nothing for the 5 s after which it is told.
BOUND_S = 25.0
OTHERS_VARIABLES = ("ZEOID_TLS", "ZEOID_TLS_CA", "ZEOID_TOKEN", "ZEOID_TOKEN_FILE")


def tool(*arguments: Any, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in environment().items() if name not in OTHERS_VARIABLES}
    return subprocess.run(
        command(arguments),
        cwd=cwd, env={**env, **variables}, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip


class House:
    """A server with TLS and one without, and the papers of their clients."""

    def __init__(self, folder: Path, made: list[Serving]) -> None:
        self.folder = folder
        for name in ("authority", "stranger"):
            (folder / name).mkdir()
        self.authority = Authority(folder / "authority")
        self.stranger = Authority(folder / "stranger", "a stranger")
        self.token = tokens.make(folder / "tokens.json", "reports", "admin", (), None, time.time())
        self.token_file = folder / "token"
        self.token_file.write_text(f"{self.token}\n")
        self.revoked = self.authority.client("former")
        self.admin = self.authority.client("boss", unit="zeoid role: admin")
        self.audit = folder / "audit.log"
        serve = serve_until(folder, made)
        self.options = [
            "--tls", self.authority.server(), "--tls-revoked", self.authority.revoke(self.revoked),
        ]  # fmt: skip
        self.tls = serve(
            "-p", 0, "-h", "127.0.0.1", *self.options, "--tokens", folder / "tokens.json",
            "--audit-log", self.audit, folder / "Data.fs",
        )  # fmt: skip
        self.strict = serve("-p", 0, "-h", "127.0.0.1", *self.options, folder / "strict.fs")
        self.plain = serve("-p", 0, "-h", "127.0.0.1", folder / "plain.fs")


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    made: list[Serving] = []
    try:
        yield House(tmp_path_factory.mktemp("house"), made)
        for serving in made:
            assert serving.stop() == 0, serving.log.text()
            assert "Traceback" not in serving.log.text()
    finally:
        for serving in made:
            serving.end()


def shown(serving: Serving) -> str:
    host, port = serving.address
    return f"{host}:{port}"


# What gets through -------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [
    "certificate", "files of their own", "certificate by a variable", "token from a file",
    "token from a file by a variable", "token by a variable",
])  # fmt: skip
@pytest.mark.parametrize("verb", ["pack", "checkpoint"])
def test_the_tools_get_through(house: House, verb: str, way: str, tmp_path: Path) -> None:
    ca = ["--tls-ca", house.authority.file]
    key, certificate, _ = house.authority.issue("other", server=False, unit="zeoid role: admin")
    (tmp_path / "key.pem").write_bytes(key)
    (tmp_path / "certificate.pem").write_bytes(certificate)
    options, variables = {
        "certificate": (["--tls", house.admin], {}),
        "files of their own": (["--tls", "certificate.pem", "--tls-key", "key.pem", *ca], {}),
        "certificate by a variable": ([], {"ZEOID_TLS": house.admin}),
        "token from a file": ([*ca, "--token-file", house.token_file], {"ZEOID_TOKEN": "no good"}),
        "token from a file by a variable": (ca, {"ZEOID_TOKEN_FILE": str(house.token_file)}),
        "token by a variable": ([], {"ZEOID_TLS_CA": house.authority.file, "ZEOID_TOKEN": house.token}),
    }[way]
    done = tool(verb, shown(house.tls), *options, cwd=tmp_path, **variables)
    assert done.returncode == 0, done.stderr
    assert {"pack": "is packed", "checkpoint": "is complete up to"}[verb] in done.stdout
    assert house.token not in house.tls.log.text() + house.audit.read_text()


def test_copying_over_tls(house: House, tmp_path: Path) -> None:
    """With the options, in both directions, and with what a URI says of itself."""
    with RawClient(house.plain.address) as raw:
        raw.register().commit(bytes(8), record(b"data"))
    done = tool("copy", f"zeoid://{shown(house.plain)}", tmp_path / "plain.fs", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    by_token = ["--tls-ca", house.authority.file, "--token-file", house.token_file]
    for options, serving in ((["--tls", house.admin], house.strict), (by_token, house.tls)):
        done = tool("copy", *options, tmp_path / "plain.fs", f"zeoid://{shown(serving)}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "verified: " in done.stdout
    uri = f"zeoid://{shown(house.strict)}?tls={house.admin}&tls_server_hostname=localhost"
    done = tool("copy", uri, tmp_path / "back.fs", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


# Refusals ----------------------------------------------------------------------------------------------

Case = Callable[[House], tuple[Sequence[Any], str, str]]
#: What is given, what the tool says, and what the server does: nothing, if it has heard of nothing wrong.
REFUSALS: dict[str, Case] = {
    "a server of another authority": lambda house: (
        ["--tls", house.stranger.client()],
        "no TLS with {address}: the server's certificate was signed by no authority that this client trusts",
        "refused: the client does not trust the authority that signed this server's certificate",
    ),
    "a client of another authority": lambda house: (
        ["--tls", house.stranger.client(), "--tls-ca", house.authority.file],
        "no TLS with {address}: the server does not trust the authority that signed this client's "
        "certificate",
        "refused: the client's certificate was signed by no authority that this server trusts",
    ),
    "expired": lambda house: (
        ["--tls", house.authority.client("expired", days=-1)],
        "no TLS with {address}: the server says that this client's certificate has expired",
        "refused: the client's certificate has expired",
    ),
    "revoked": lambda house: (
        ["--tls", house.revoked],
        "no TLS with {address}: the server says that this client's certificate was revoked",
        "refused: the client's certificate was revoked",
    ),
    "another host": lambda house: (
        ["--tls", house.admin, "--tls-server-hostname", "zoo.example.org"],
        "no TLS with {address}: the server's certificate is not for 'zoo.example.org': it is for localhost, "
        "127.0.0.1",
        "refused: the client does not accept this server's certificate, or the name in it",
    ),
    "no certificate": lambda house: (
        ["--tls-ca", house.authority.file],
        "no TLS with {address}: the server wants a certificate of this client",
        "refused: the client shows no certificate",
    ),
    "no TLS": lambda house: (
        [],
        "no connection to {address}: the server wants TLS: this client has none",
        "refused: it says nothing, as a client without TLS does",
    ),
}  # fmt: skip


def warnings_after(serving: Serving, count: int) -> list[str]:
    """What it has complained of since its log had *count* lines, without the time and the client's port."""
    with RawClient(serving.address) as raw:  # what came before this was seen before this
        raw.send(b"GET / HTTP/1.1\r\n\r\n")
        wait_until(lambda: serving.log.find(f"{raw.name} "), "it has seen to the last of its clients", 30)
        return [
            line.split(" ", 4)[4]
            for line in serving.lines[count:]
            if " INFO " not in line and f"{raw.name} " not in line
        ]


def refused(done: subprocess.CompletedProcess[str], words: str) -> None:
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert done.stderr == f"zeoid: {words}\n"


@pytest.mark.parametrize("name", REFUSALS)
@pytest.mark.parametrize("verb", ["checkpoint", "copy"])
def test_a_refusal_is_one_line_on_each_side(house: House, verb: str, name: str, tmp_path: Path) -> None:
    serving = house.strict
    options, by_client, by_server = REFUSALS[name](house)
    before, began_s = len(serving.lines), time.monotonic()
    address = shown(serving)
    if verb == "copy":
        done = tool("copy", *options, f"zeoid://{address}", "copy.fs", cwd=tmp_path)
        assert not (tmp_path / "copy.fs").exists()
    else:
        done = tool(verb, address, *options, cwd=tmp_path)
    assert time.monotonic() - began_s < BOUND_S
    by_client = by_client.format(address=address)
    refused(done, f"can't open zeoid://{address}: {by_client}" if verb == "copy" else by_client)
    assert warnings_after(serving, before) == [by_server]


def test_tls_to_a_server_without(house: House, tmp_path: Path) -> None:
    before, address = len(house.plain.lines), shown(house.plain)
    done = tool("checkpoint", address, "--tls", house.admin, cwd=tmp_path)
    refused(done, f"no TLS with {address}: the server speaks no TLS")
    assert [line for line in house.plain.lines[before:] if " INFO " not in line]
    assert len(warnings_after(house.plain, before)) == 1


def test_a_token_is_not_sent_in_the_clear(house: House, tmp_path: Path) -> None:
    address = shown(house.plain)
    done = tool("checkpoint", address, "--token-file", house.token_file, cwd=tmp_path)
    refused(done, f"the token is not sent to {address}: this connection is not encrypted")


def test_a_token_that_came_in_the_clear(house: House) -> None:
    """A client that does send it is told that others may have it by now."""
    with RawClient(house.plain.address) as raw:
        raw.shake_hands()
        with pytest.raises(Exception, match="must not be sent in the clear"):
            raw.call("authenticate", house.token)
        assert raw.read_to_end() == b""
        said = wait_until(lambda: house.plain.lines_about(raw), "it has said so")
    assert len([line for line in said if "WARNING" in line]) == 1
    assert house.token not in house.plain.log.text()


def test_a_bad_token(house: House, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("zeoid_reports_" + "x" * 43)
    before, address = len(house.tls.lines), shown(house.tls)
    options = ["--tls-ca", house.authority.file, "--token-file", "token"]
    refused(
        tool("checkpoint", address, *options, cwd=tmp_path),
        f"{address} refused the token: this token is not known here",
    )
    assert warnings_after(house.tls, before) == ["dropped: it did not get in: this token is not known here"]


def test_a_client_that_shows_nothing(house: House, tmp_path: Path) -> None:
    before, address = len(house.tls.lines), shown(house.tls)
    refused(
        tool("checkpoint", address, "--tls-ca", house.authority.file, cwd=tmp_path),
        f"{address} refused: register: this server wants a certificate or a token first",
    )
    assert warnings_after(house.tls, before) == [
        "dropped: it did not get in: register: this server wants a certificate or a token first"
    ]


@contextlib.contextmanager
def old_server(context: ssl.SSLContext) -> Iterator[tuple[str, list[str]]]:
    """A server that speaks TLS of long ago, and what it met."""
    met: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    sock, _ = listener.accept()
                except OSError:
                    return
                with sock:
                    try:
                        context.wrap_socket(sock, server_side=True).close()
                        met.append("a client")
                    except OSError as problem:
                        met.append(str(problem))

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}", met
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(10)


def of_long_ago(protocol: int, version: ssl.TLSVersion) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLS"):
        context.minimum_version = context.maximum_version = version
    return context


OLD = pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])


@OLD
def test_a_server_of_long_ago(house: House, version: ssl.TLSVersion, tmp_path: Path) -> None:
    context = of_long_ago(ssl.PROTOCOL_TLS_SERVER, version)
    context.load_cert_chain(house.authority.server("old"))
    with old_server(context) as (address, met):
        done = tool("checkpoint", address, "--tls", house.admin, cwd=tmp_path)
        assert done.returncode == 2
        assert done.stderr.startswith(f"zeoid: no TLS with {address}: the server speaks ")
        assert done.stderr.count("\n") == 1
        assert "a client" not in met


@OLD
def test_a_client_of_long_ago(house: House, version: ssl.TLSVersion) -> None:
    context = of_long_ago(ssl.PROTOCOL_TLS_CLIENT, version)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.load_cert_chain(house.admin)
    before = len(house.strict.lines)
    with socket.create_connection(house.strict.address, 30) as sock, pytest.raises(ssl.SSLError):
        context.wrap_socket(sock)
    (line,) = warnings_after(house.strict, before)
    assert line == "refused: the client speaks only TLS that is older than 1.2"


# While it runs -----------------------------------------------------------------------------------------


def test_sighup(serve: Callable[..., Serving], tmp_path: Path) -> None:
    """It reads certificates again, and goes on in a new audit log."""
    old, new = Authority(tmp_path), tmp_path / "new"
    audit, moved = tmp_path / "audit.log", tmp_path / "audit.log.1"
    bundle = Path(old.server())
    serving = serve("-p", 0, "-h", "127.0.0.1", "--tls", bundle, "--audit-log", audit, "Data.fs")
    admin = old.client(unit="zeoid role: admin")
    assert tool("checkpoint", shown(serving), "--tls", admin, cwd=tmp_path).returncode == 0
    new.mkdir()
    changed = Authority(new, "another authority")
    bundle.write_bytes(Path(changed.server()).read_bytes())
    audit.rename(moved)
    serving.process.send_signal(signal.SIGHUP)
    serving.log.wait_for("certificates were read again", 30)
    wait_until(audit.exists, "there is a new audit log", 30)
    assert tool("checkpoint", shown(serving), "--tls", admin, cwd=tmp_path).returncode == 2
    admin = changed.client(unit="zeoid role: admin")
    assert tool("checkpoint", shown(serving), "--tls", admin, cwd=tmp_path).returncode == 0
    for file in (moved, audit):
        events = [json.loads(line)["event"] for line in file.read_text().splitlines()]
        assert "checkpoint" in events
        if os.name == "posix":
            assert file.stat().st_mode & 0o777 == 0o600
