"""From nothing to three computers: the security guide's first chapter, carried out as it stands there.

Real Zopes with ZEO's own client, each in a network namespace that stands for a computer, and a stranger. Old
clients, by the guide's chapter on them.
"""

from __future__ import annotations

import json
import secrets
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from demo import tour
from demo.processes import DemoError
from demo.zope import User, Zope, ZopeVenv, environment, write_instance

from tests.network import house
from tests.network.guide import Command
from tests.network.zoo import COMMANDS, COMPUTERS, OLD_CLIENTS, ZOPES, Zoo

SERVE = COMPUTERS.command("zeoid serve")
PACK = COMPUTERS.command("zeoid pack")


@pytest.fixture(scope="module", autouse=True)
def _needed() -> None:
    if reason := house.missing(*COMMANDS):
        pytest.skip(reason)


@pytest.fixture(scope="module")
def zoo() -> Iterator[Zoo]:
    """All but the Zopes; the server runs."""
    with Zoo() as zoo:
        zoo.stay(SERVE)
        yield zoo


@pytest.fixture(scope="module")
def zopes(zoo: Zoo, zope_venv: Path) -> list[Zope]:
    user = User("admin", secrets.token_hex(6))

    def start(name: str) -> Zope:
        database = COMPUTERS.file("zoo1", "/srv/zope/etc/zope.conf").replace("zoo1", name)
        first = user if name == ZOPES[0] else None
        write_instance(zoo.disk(name) / "zope", database, first, home=house.DISK / "zope")
        command = (str(ZopeVenv(zope_venv).runwsgi), str(house.DISK / "zope" / "zope.ini"))
        process = zoo.start(name, *command, environment={**environment(), "TMPDIR": str(house.DISK)})
        return Zope(name, process, user, partial(zoo.here, name))

    def wait(zope: Zope) -> Zope:
        try:
            zope.wait_until_ready()
        except DemoError as problem:
            raise AssertionError("\n".join(process.tail() for process in zoo.processes)) from problem
        return zope

    return [wait(start(ZOPES[0])), *map(wait, [start(name) for name in ZOPES[1:]])]


def test_each_zope_sees_what_the_others_write(zoo: Zoo, zopes: list[Zope]) -> None:
    writings = list(tour.write_in_turn(zopes))
    assert [(each.writer, sorted(each.delays_s)) for each in writings] == [
        ("zoo1", ["zoo2", "zoo3"]), ("zoo2", ["zoo1", "zoo3"]), ("zoo3", ["zoo1", "zoo2"]),
    ]  # fmt: skip
    events = [json.loads(line) for line in (zoo.disk("zooserver") / "audit.log").read_text().splitlines()]
    connected = [event for event in events if event["event"] == "connected"]
    known = {(event["name"], event["how"], event["role"]) for event in connected}
    assert {(name, "certificate", "write") for name in ZOPES} <= known


@pytest.mark.parametrize("program", COMPUTERS.programs, ids=["zeoid", "zeo"])
def test_a_program(zoo: Zoo, program: str) -> None:
    done = zoo.run("zoo1", "python", "-c", f"{program}\nprint(storage.ping())")
    assert (done.stdout, done.returncode) == ("None\n", 0), done.stderr


def test_packing_takes_the_role_for_it(zoo: Zoo) -> None:
    zoo.do(COMPUTERS.command("scp certs/clients/boss.pem"))
    assert "bytes" in zoo.do(PACK)
    mine = [word.replace("boss.pem", "zope/etc/zoo1.pem") for word in PACK.words]
    assert zoo.refused("zoo1", *mine).endswith("pack needs the role admin; zoo1 has write\n")


@pytest.fixture(scope="module")
def stranger(zoo: Zoo) -> Zoo:
    """The stranger has the authority's certificate, which is no secret, and an authority of its own."""
    (zoo.disk("stranger") / "ca.pem").write_bytes((zoo.disk("zooserver") / "certs" / "ca.pem").read_bytes())
    zoo.do(Command("stranger", "zeoid certs init"))
    zoo.do(Command("stranger", "zeoid certs client zoo1 --role admin"))
    return zoo


OF_THE_STRANGER = ("--tls", "certs/clients/zoo1.pem", "--tls-ca", "ca.pem")


def test_a_stranger_gets_nowhere(stranger: Zoo) -> None:
    ask = ("zeoid", "checkpoint", "zooserver:7700")
    reasons = {
        (): "the server wants TLS: this client has none",
        OF_THE_STRANGER[2:]: "the server wants a certificate of this client",
        OF_THE_STRANGER[:2]: "the server's certificate was signed by no authority that this client trusts",
        OF_THE_STRANGER: "the server does not trust the authority that signed this client's certificate",
    }
    with ThreadPoolExecutor() as threads:
        said = list(threads.map(lambda options: stranger.refused("stranger", *ask, *options), reasons))
    for line, reason in zip(said, reasons.values(), strict=True):
        assert reason in line
        assert f"| {reason} |" in COMPUTERS.text


def test_a_lost_computer_is_cut_off() -> None:
    """Somebody has taken zoo3's file elsewhere."""
    program = COMPUTERS.programs[0].replace("zoo1", "zoo3")
    program += "\nimport threading; print('connected', flush=True); threading.Event().wait()"
    with Zoo("zoo3") as zoo:
        server = zoo.stay(SERVE)
        (zoo.disk("stranger") / "zoo3.pem").write_bytes((zoo.disk("zoo3") / "zope/etc/zoo3.pem").read_bytes())
        elsewhere = Command("stranger", "zeoid copy --no-verify zeoid://zooserver:7700?tls=zoo3.pem Copy.fs")
        zoo.do(elsewhere)
        zoo.wait_for(zoo.start("zoo3", "python", "-c", program), "connected")
        zoo.do(COMPUTERS.command("zeoid certs revoke"))
        zoo.wait_for(server, r"zoo3 at .*its certificate was revoked")
        ask = ("zeoid", "checkpoint", "zooserver:7700", "--tls", "zoo3.pem")
        assert "the server says that this client's certificate was revoked" in zoo.refused("stranger", *ask)


# Old clients

OLD_CLIENT = """\
import sys, ZEO
database = ZEO.DB((sys.argv[1], int(sys.argv[2])), wait_timeout=5)
with database.transaction() as connection:
    connection.root()[sys.argv[3]] = True
with database.transaction() as connection:
    print(*sorted(connection.root()))
database.close()
"""


def old_client(zoo: Zoo, computer: str, host: str, port: int) -> bool:
    """Whether ZEO's own client, without TLS, can write and read there."""
    word = secrets.token_hex(4)
    done = zoo.run(computer, "python", "-c", OLD_CLIENT, host, str(port), word)
    assert (word in done.stdout.split()) == (done.returncode == 0), done.stderr
    assert done.returncode == 0 or "ClientDisconnected" in done.stderr, done.stderr
    return done.returncode == 0


def need(command: str) -> None:
    if reason := house.missing(command):
        pytest.skip(reason)


@pytest.fixture(scope="module")
def old_server(zoo: Zoo) -> Zoo:
    """A server for this machine only."""
    zoo.stay(OLD_CLIENTS.command("zeoid serve -a"))
    return zoo


@pytest.mark.parametrize("tunnel", OLD_CLIENTS.commands_with("ssh -N"), ids=["port", "unix socket"])
def test_ssh(old_server: Zoo, tunnel: Command) -> None:
    port = int(tunnel.line.split(":")[1])
    own = old_server.stay(tunnel)
    old_server.wait_until_connects(own, tunnel.computer, "127.0.0.1", port)
    assert old_client(old_server, tunnel.computer, "localhost", port)
    assert not old_server.connects("zoo2", "zooserver", 7701)
    done = old_server.run("stranger", *tunnel.words)
    assert (done.returncode, "Permission denied" in done.stderr) == (255, True), done


def test_a_key_for_a_tunnel_and_nothing_else(old_server: Zoo) -> None:
    zoo = old_server
    tunnel, _ = OLD_CLIENTS.commands_with("ssh -N")
    keys = zoo.etc("zooserver") / "ssh" / "authorized_keys"
    (line,) = (line for line in OLD_CLIENTS.text.splitlines() if line.startswith("restrict,"))
    before = keys.read_text()
    keys.write_text(f"{line.partition(' ')[0]} {before}")
    try:
        other = replace(tunnel, line=tunnel.line.replace("7701:localhost", "7711:localhost"))
        process = zoo.stay(other)
        zoo.wait_until_connects(process, "zoo1", "127.0.0.1", 7711)
        assert old_client(zoo, "zoo1", "localhost", 7711)
        assert zoo.run("zoo1", "ssh", "zooserver", "touch /srv/touched").returncode == 1
        assert not (zoo.disk("zooserver") / "touched").exists()
        elsewhere = replace(tunnel, line=tunnel.line.replace("7701:localhost:7701", "7712:localhost:22"))
        zoo.wait_until_connects(zoo.stay(elsewhere), "zoo1", "127.0.0.1", 7712)  # ssh itself takes it
        with zoo.here("zoo1"), socket.create_connection(("127.0.0.1", 7712), 20.0) as connection:
            assert connection.recv(100) == b"", "nobody is there"
    finally:
        keys.write_text(before)


def test_stunnel(old_server: Zoo, stranger: Zoo) -> None:
    need("stunnel")
    zoo = old_server
    zoo.do(Command("zooserver", "zeoid certs client lost"))
    zoo.do(Command("zooserver", "zeoid certs revoke lost"))
    zoo.do(Command("zooserver", "scp certs/clients/lost.pem zoo2:/srv/"))
    for computer, host in (("zooserver", "zooserver"), ("zoo1", "127.0.0.1")):
        zoo.write(OLD_CLIENTS, computer, "/srv/stunnel.conf")
        process = zoo.stay(OLD_CLIENTS.command("stunnel", computer))
        zoo.wait_until_connects(process, computer, host, 7703)
    assert old_client(zoo, "zoo1", "localhost", 7703)
    ask = ("zeoid", "checkpoint", "zooserver:7703")
    zoo.do(Command("zoo2", f"{' '.join(ask)} --tls zope/etc/zoo2.pem"))
    assert "certificate was revoked" in zoo.refused("zoo2", *ask, "--tls", "lost.pem")
    assert "does not trust the authority" in zoo.refused("stranger", *ask, *OF_THE_STRANGER)
    assert "wants a certificate" in zoo.refused("stranger", *ask, *OF_THE_STRANGER[2:])


def test_nftables(zoo: Zoo) -> None:
    need("nft")
    zoo.write(OLD_CLIENTS, "zooserver", "/srv/zeo.nft")
    zoo.do(OLD_CLIENTS.command("nft"))
    zoo.stay(OLD_CLIENTS.command("zeoid serve -h"))
    assert all(old_client(zoo, name, "zooserver", 7704) for name in ZOPES)
    assert not zoo.connects("stranger", "zooserver", 7704)
    assert zoo.connects("stranger", "zooserver", 7700), "the rules are about the one port only"
    zoo.do(Command("zooserver", "nft delete table inet zeo"))
    assert old_client(zoo, "stranger", "zooserver", 7704), "it was the rules that kept the stranger out"
