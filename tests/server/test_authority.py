"""Who may call what: every method of the protocol, by everybody who may be at the other end."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ZODB.POSException import ReadOnlyError
from ZODB.utils import p64

from tests.security.subjects import certificate, with_role
from tests.server.assertions import log_lines, refuses
from tests.server.inmemory import Call, MemoryHouse, Peer
from zeoid import limits
from zeoid.engines.opening import open_filestorage, open_memory
from zeoid.errors import Forbidden, InvalidCall
from zeoid.model import MAX_TID, NO_TID
from zeoid.security import names, roles, tokens
from zeoid.security.audit import AuditFile, to_file
from zeoid.security.identity import LOCAL
from zeoid.security.identity import Peer as Whose
from zeoid.security.roles import EVERYTHING, Policy
from zeoid.security.watched import Watched
from zeoid.server import authority
from zeoid.server.admission import Admission
from zeoid.server.authority import handlers
from zeoid.server.methods import METHODS
from zeoid.wire.frames import frame
from zeoid.wire.messages import SERVER_METHODS, STORE, Access, Method, Phase

A = p64(1)
WHERE = "192.0.2.7:5000"
ROLES = ["read", "write", "admin", "replica"]
#: What each may do, said a second time: the first is what is tested.
GRANTED = {
    "read": {"read"},
    "write": {"read", "write"},
    "admin": {"read", "write", "admin"},
    "replica": {"read", "replica"},
    "everything": {"read", "write", "admin", "replica"},
}
REGISTERED = [method for method in SERVER_METHODS.values() if method.phase is Phase.REGISTERED]
codings = pytest.mark.parametrize("coding", ["M5", "Z5"])


class Clock:
    now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


class Town:
    """A server with rules, and those who come to it."""

    def __init__(self, make_house: Callable[..., MemoryHouse], folder: Path) -> None:
        self._make_house = make_house
        self._folder = folder
        self.clock = Clock()
        self.tokens_file = folder / "tokens.json"
        self.access_file = folder / "access"
        self.tokens = {role: self.token(role, role) for role in ROLES}
        self.open()

    def token(self, name: str, role: str, *storages: str, days: float | None = None) -> str:
        return tokens.make(self.tokens_file, name, role, storages, days, self.clock.now)

    def open(self, access: str | None = None, **engines: Any) -> MemoryHouse:
        """With these storages and this access file."""
        rules = None
        if access is not None:
            self.access_file.write_text(access)
            rules = Watched(self.access_file, roles.parse_access, monotonic=self.clock)
        known = tokens.watched(self.tokens_file, monotonic=self.clock)
        policy = Policy(access=rules, known_tokens=known, now=self.clock)
        self.house = self._make_house(engines or None, policy=policy)
        return self.house

    def later(self) -> None:
        """The server has looked at its files."""
        self.clock.now += 2 * limits.RULES_RELOAD_S
        self.house.admission.tick(self.house.storages)

    def stranger(self, coding: str = "M5", where: str = WHERE, **keywords: Any) -> Peer:
        at = Whose(where, **{"trusted": False, "encrypted": True, **keywords})
        return Peer(self.house, coding=coding, at=at)

    def certified(self, name: str, role: str | None = None, **keywords: Any) -> Peer:
        der = certificate(name) if role is None else with_role(name, role)
        return self.stranger(certificate=der, **keywords)

    def arrival(self, who: str, coding: str = "M5") -> Peer:
        """Somebody who has not registered: `trusted`, `nobody`, or how and with which role."""
        how, _, role = who.partition(" ")
        if how == "trusted":
            return Peer(self.house, coding=coding, at=Whose(LOCAL))
        if how == "certificate":
            return self.certified("zope1", role, coding=coding)
        peer = self.stranger(coding)
        if how == "token":
            peer.ask("authenticate", self.tokens[role])
        return peer


@pytest.fixture
def town(make_house: Callable[..., MemoryHouse], tmp_path: Path) -> Town:
    return Town(make_house, tmp_path)


@pytest.fixture
def audit_file(tmp_path: Path) -> Iterator[AuditFile]:
    file = to_file(tmp_path / "audit.log")
    yield file
    file.close()


def events(file: AuditFile) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(file.baseFilename).read_text().splitlines()]


def granted(who: str) -> set[str]:
    return GRANTED["everything" if who == "trusted" else who.partition(" ")[2]]


def name_of(who: str) -> str:
    how, _, role = who.partition(" ")
    return f"token:{role}" if how == "token" else "zope1"


KNOWN = ["trusted", *(f"{how} {role}" for how in ("certificate", "token") for role in ROLES)]

# Every method -----------------------------------------------------------------------------------------


@codings
@pytest.mark.parametrize("who", KNOWN)
def test_every_method_by_everybody_who_is_known(town: Town, who: str, coding: str) -> None:
    peer = town.arrival(who, coding)
    peer.register(read_only="write" not in granted(who))
    allowed = {method.name for method in REGISTERED if method.access and method.access.value in granted(who)}
    carried_out, refused = set(), set()
    for method in REGISTERED:
        # With arguments that are wrong: only whoever may call it is told so.
        call = peer.start(method.name, *range(20))
        if isinstance(call.problem, Forbidden):
            refused.add(method.name)
            assert method.access is not None
            assert str(call.problem) == (
                f"{method.name} needs the role {method.access.value}; {name_of(who)} has {who.split()[1]}"
            )
        else:
            refuses(call, f"{method.name} takes (")
            carried_out.add(method.name)
        assert not peer.dropped
    assert carried_out == allowed
    assert refused == {method.name for method in REGISTERED} - allowed
    assert peer.ask("lastTransaction") == NO_TID


@codings
@pytest.mark.parametrize("method", [m for m in SERVER_METHODS.values() if m.name != "authenticate"],
                         ids=lambda method: method.name)  # fmt: skip
def test_every_method_by_somebody_who_is_not_known(town: Town, method: Method, coding: str) -> None:
    peer = town.stranger(coding)
    args = ("1", True) if method.name == "register" else range(20)
    call = peer.start(method.name, *args)
    assert isinstance(call.problem, Forbidden)
    assert str(call.problem) == f"{method.name}: this server wants a certificate or a token first"
    assert peer.dropped


@pytest.mark.parametrize("method", SERVER_METHODS.values(), ids=lambda method: method.name)
def test_one_way_calls_by_somebody_who_is_not_known(town: Town, method: Method) -> None:
    if method.name == "authenticate":
        return
    peer = town.stranger()
    peer.one_way(method.name, *range(20))
    assert peer.dropped


@pytest.mark.parametrize("who", KNOWN)
def test_nothing_but_who_it_is_before_register(town: Town, who: str) -> None:
    peer = town.arrival(who)
    for method in REGISTERED:
        refuses(peer.start(method.name), f"{method.name} can't be called before register")
    assert not peer.dropped


def test_a_method_without_an_access_opens_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SERVER_METHODS, "odd", Method("odd", ()))
    monkeypatch.setitem(METHODS, "odd", lambda session: None)
    for rights in (EVERYTHING, *roles.GRANTS.values(), None):
        check, carry_out, *_ = handlers.__wrapped__(rights)["odd"]
        assert check is authority._unchecked
        assert getattr(carry_out, "func", None) is authority._refuse


def test_every_method_has_a_handler_for_everybody() -> None:
    for rights in (EVERYTHING, *roles.GRANTS.values(), None):
        assert set(handlers(rights)) == set(SERVER_METHODS)


# What refusals leave alone ----------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["certificate write", "token write"])
def test_a_pack_that_is_forbidden_does_not_begin(town: Town, who: str) -> None:
    peer = town.arrival(who).register()
    with pytest.raises(Forbidden):
        peer.ask("pack", 1.0, True)
    assert len(town.house.packs) == 0
    assert not peer.dropped
    assert peer.commit(A)


def test_an_admin_packs(town: Town, tmp_path: Path) -> None:
    town.open(**{"1": open_filestorage(tmp_path / "Data.fs")})
    peer = town.arrival("certificate admin").register()
    call = peer.start("pack", 1.0, True)
    town.house.packs.run_all()
    peer.read()
    assert call.result is None


@pytest.mark.parametrize("name", ["tpc_begin", "storea", "tpc_operate", "storeBlobStart", "pack", "vote"])
def test_a_one_way_call_that_is_forbidden_ends_the_connection(
    town: Town, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    peer = town.arrival("certificate read").register(read_only=True)
    caplog.clear()
    peer.one_way(name, *range(20))
    assert peer.dropped
    (line,) = log_lines(caplog)
    assert line.startswith(f"zope1 at {WHERE} dropped: {name} needs the role ")


def test_a_reader_commits_nothing(town: Town) -> None:
    peer = town.arrival("token read").register(read_only=True)
    operations = [(STORE, A, None, b"data", None)]
    call = peer.start("tpc_prepare", b"x" * 16, (b"", b"", {}, None, " "), operations)
    town.house.work()
    peer.read()
    with pytest.raises(Forbidden, match="tpc_prepare needs the role write; token:read has read"):
        _ = call.result
    assert town.house.hosted.visible.tid == NO_TID


def test_loads_take_the_short_way_when_they_may(town: Town) -> None:
    writer = town.arrival("certificate write").register()
    tid = writer.commit(A)
    for who in ("certificate read", "token replica"):
        reader = town.arrival(who).register(read_only=True)
        assert reader.ask("loadBefore", A, MAX_TID)[1] == tid
        assert reader.session._answers_loads
    assert not town.stranger().session._answers_loads


def test_whoever_asks_to_write_and_may_only_read(town: Town) -> None:
    for who in ("certificate read", "token read", "certificate replica"):
        peer = town.arrival(who)
        with pytest.raises(ReadOnlyError):
            peer.register()
        assert not peer.dropped
        peer.register(read_only=True)


def test_a_blob_connection_may_do_what_its_session_may(town: Town) -> None:
    for who, read_only in (("certificate read", True), ("certificate write", False), ("trusted", False)):
        peer = town.arrival(who).register(read_only="write" not in granted(who))
        assert peer.session.grant.read_only is read_only
    peer = town.arrival("certificate write").register(read_only=True)
    assert peer.session.grant.read_only


# Storages ---------------------------------------------------------------------------------------------


def two() -> dict[str, Any]:
    return {"1": open_memory(), "secret": open_memory()}


def test_other_roles_in_other_storages(town: Town) -> None:
    town.open("zope1 admin 1\nzope1 read secret", **two())
    town.certified("zope1").register("1").ask("new_oids", 1)
    peer = town.certified("zope1").register("secret", read_only=True)
    with pytest.raises(Forbidden, match="new_oids needs the role write; zope1 has read"):
        peer.ask("new_oids", 1)
    with pytest.raises(ReadOnlyError):
        town.certified("zope1").register("secret")


def test_a_token_for_one_storage(town: Town) -> None:
    token = town.token("one", "write", "1")
    town.open(**two())
    peer = town.stranger()
    peer.ask("authenticate", token)
    refuses(peer.start("register", "secret", True), "unknown storage: 'secret'; token:one may use '1'")
    peer.register("1")


def test_a_storage_that_may_not_be_read_is_like_one_that_is_not_there(town: Town) -> None:
    town.open("zope1 write 1\nzope2 write other", **two())
    said = []
    for name in ("secret", "no such"):
        call = town.certified("zope1").start("register", name, True)
        refuses(call, "may use '1'")
        said.append(str(call.problem).replace(name, "NAME"))
    assert said[0] == said[1]
    refuses(town.certified("zope2").start("register", "1", True), "zope2 may use none")
    refuses(town.certified("zope3").start("register", "1", True), "zope3 may use none")


def test_only_whoever_is_in_the_access_file(town: Town) -> None:
    town.open("token:read admin")
    refuses(town.arrival("certificate admin").start("register", "1", True), "zope1 may use none")
    refuses(town.arrival("token admin").start("register", "1", True), "token:admin may use none")
    assert town.arrival("token read").register().ask("new_oids", 1)
    assert town.arrival("trusted").register().ask("new_oids", 1)


# Status -----------------------------------------------------------------------------------------------


def status(peer: Peer) -> dict[str, Any] | None:
    """What `ruok` is answered with, of a peer whose handshake is still to come."""
    peer.wire.take()
    peer.session.receive(frame(b"ruok"))
    assert peer.dropped
    answer = peer.wire.take()
    told: dict[str, Any] | None = json.loads(answer[4:]) if answer else None
    return told


class Asking(Peer):
    """One that says nothing of its own."""

    def send(self, data: bytes) -> None:
        if self.wire.writes or data:
            return
        super().send(data)


def asking(town: Town, at: Whose) -> dict[str, Any] | None:
    return status(Asking(town.house, at=at))


def test_the_status_is_for_those_who_are_known(town: Town) -> None:
    town.open("zope1 read secret", **two())
    assert asking(town, Whose(WHERE, trusted=False, encrypted=True)) is None
    assert set(asking(town, Whose(LOCAL)) or ()) == {"1", "secret"}
    certified = Whose(WHERE, trusted=False, encrypted=True, certificate=certificate("zope1"))
    assert set(asking(town, certified) or ()) == {"secret"}


# Tokens -----------------------------------------------------------------------------------------------


def login(peer: Peer, token: str) -> Call:
    return peer.start("authenticate", token)


@codings
def test_a_token(town: Town, coding: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "zeoid.server")
    peer = town.stranger(coding)
    assert login(peer, town.tokens["write"]).result == "token:write"
    peer.register()
    assert peer.commit(A)
    assert f"token:write at {WHERE} connected to storage '1' for writing" in caplog.text
    assert town.tokens["write"] not in caplog.text


@pytest.mark.parametrize("shown", ["", "x", "zeoid_write_" + "A" * 43, "x" * 1000, "\n"], ids=len)
def test_a_token_that_is_no_good(
    town: Town, caplog: pytest.LogCaptureFixture, shown: str, audit_file: AuditFile
) -> None:
    peer = town.stranger()
    call = login(peer, shown)
    assert isinstance(call.problem, Forbidden)
    assert peer.dropped
    assert len(shown) < 2 or shown not in caplog.text + Path(audit_file.baseFilename).read_text()
    assert [event["event"] for event in events(audit_file)] == ["refused"]


def test_a_good_certificate_does_not_save_a_bad_token(town: Town) -> None:
    peer = town.certified("zope1", "admin")
    with pytest.raises(Forbidden, match="not known here"):
        _ = login(peer, "zeoid_write_" + "A" * 43).result
    assert peer.dropped


@pytest.mark.parametrize("trusted", [True, False])
def test_a_token_in_the_clear_is_not_taken(town: Town, trusted: bool) -> None:
    peer = town.stranger(trusted=trusted, encrypted=False)
    with pytest.raises(Forbidden, match="in the clear"):
        _ = login(peer, town.tokens["write"]).result
    assert peer.dropped


def test_a_token_through_a_unix_socket_is_not_needed(town: Town) -> None:
    peer = town.arrival("trusted")
    assert login(peer, "whatever").result == ""
    assert peer.register().ask("new_oids", 1)


def test_a_token_after_register_is_too_late(town: Town) -> None:
    peer = town.arrival("certificate read").register(read_only=True)
    refuses(login(peer, town.tokens["admin"]), "can't be called after register")
    with pytest.raises(Forbidden):
        peer.ask("pack", 1.0, True)


# Failed logins ----------------------------------------------------------------------------------------


def wrong(number: int) -> str:
    return f"zeoid_write_{number:043}"


def fail(town: Town, times: int, where: str = WHERE) -> None:
    for number in range(times):
        assert isinstance(login(town.stranger(where=where), wrong(number)).problem, Forbidden)


def test_an_address_that_fails_too_often_is_refused_for_a_minute(town: Town) -> None:
    good = town.tokens["write"]
    fail(town, limits.FAILED_LOGINS_PER_MINUTE - 1)
    assert login(town.stranger(), good).result
    fail(town, limits.FAILED_LOGINS_PER_MINUTE)
    peer = town.stranger(where="192.0.2.7:6000")
    with pytest.raises(Forbidden, match="too many tokens from this address were no good: wait a minute"):
        _ = login(peer, good).result
    assert peer.dropped
    assert login(town.stranger(where="192.0.2.8:5000"), good).result
    town.house.clock.now_s += 60
    assert login(town.stranger(), good).result


def test_a_program_with_one_bad_token_locks_nobody_out(town: Town) -> None:
    for _ in range(5 * limits.FAILED_LOGINS_PER_MINUTE):
        assert isinstance(login(town.stranger(), wrong(1)).problem, Forbidden)
    assert login(town.stranger(), town.tokens["write"]).result


def test_when_all_fail_too_often_only_they_are_refused() -> None:
    admission = Admission(Policy(), lambda: 0.0, per_address=10, of_all=3)
    for number in range(3):
        assert not admission.is_refused(f"192.0.2.{number}:1")
        admission.failed(f"192.0.2.{number}:1", "x")
    assert admission.is_refused("192.0.2.1:2")
    assert not admission.is_refused("192.0.2.9:2")


def test_the_table_of_failures_is_bounded() -> None:
    admission = Admission(Policy(), lambda: 0.0, per_address=1, addresses=3)
    for number in range(10):
        admission.is_refused(f"192.0.2.{number}:1")
        admission.failed(f"192.0.2.{number}:1", "x")
    refused = [number for number in range(10) if admission.is_refused(f"192.0.2.{number}:1")]
    assert refused == [7, 8, 9]
    assert len(admission._shown) == 3


def test_certificates_go_on_when_tokens_of_their_address_fail(town: Town) -> None:
    fail(town, 2 * limits.FAILED_LOGINS_PER_MINUTE)
    assert town.certified("zope1", "write").register().commit(A)


# Rules that change ------------------------------------------------------------------------------------


def test_a_token_that_is_revoked_ends_its_connections(town: Town, audit_file: AuditFile) -> None:
    gone, stays = town.arrival("token write").register(), town.arrival("token admin").register()
    tokens.revoke(town.tokens_file, "write", town.clock.now)
    assert not gone.dropped
    town.later()
    assert gone.dropped
    assert not stays.dropped
    assert stays.commit(A)
    (revoked,) = [event for event in events(audit_file) if event["event"] == "revoked"]
    assert (revoked["name"], revoked["where"]) == ("token:write", WHERE)


def test_a_token_that_expires_ends_its_connections(town: Town) -> None:
    token = town.token("short", "write", days=1)
    town.open()
    peer = town.stranger()
    peer.ask("authenticate", token)
    peer.register()
    town.later()
    assert not peer.dropped
    town.clock.now += 86400
    town.later()
    assert peer.dropped


def test_who_has_other_rights_comes_in_again(town: Town) -> None:
    town.open("zope1 read\nzope2 write")
    reader = town.certified("zope1").register(read_only=True)
    writer = town.certified("zope2").register()
    town.access_file.write_text("zope1 write # from now on\nzope2 write 1")
    town.later()
    assert reader.dropped
    assert not writer.dropped, "its rights are the same"
    assert town.certified("zope1").register().commit(A)


def test_rules_that_change_between_the_token_and_register(town: Town) -> None:
    peer = town.arrival("token admin")
    tokens.revoke(town.tokens_file, "admin", town.clock.now)
    town.later()
    refuses(peer.start("register", "1", True), "may use none")


# The audit log ----------------------------------------------------------------------------------------


def test_what_the_audit_log_hears(town: Town, tmp_path: Path, audit_file: AuditFile) -> None:
    town.open(**{"1": open_filestorage(tmp_path / "Data.fs")})
    peer = town.arrival("token admin").register()
    first = peer.commit(A)
    second = peer.commit(A, data=b"other")
    (undoable, *_) = undo_log(town, peer)
    peer.begin()
    peer.one_way("undoa", undoable["id"], 1)
    assert not [event for event in events(audit_file) if event["event"] == "undid"]
    peer._settled(peer.start("vote", 1))
    third = peer.ask("tpc_finish", 1)
    call = peer.start("checkpoint")
    town.house.slow.run_all()
    town.house.beside.run_all()
    peer.read()
    assert call.answered
    peer.start("pack", town.house.clock.time(), True)
    assert peer.ask("pack_cancel") is None
    town.house.packs.run_all()
    peer.start("pack", 1.0, True)
    town.house.packs.run_all()
    peer.disconnect()
    told = events(audit_file)
    assert [event["event"] for event in told] == [
        "authenticated", "connected", "undid", "checkpoint", "pack cancelled", "packed", "packed",
        "disconnected",
    ]  # fmt: skip
    assert first < second < third
    undid = told[2]
    assert (undid["tid"], undid["undone"]) == (third.hex(), [second.hex()])
    assert {event["name"] for event in told} == {"token:admin"}
    assert {event["role"] for event in told[1:]} == {"admin"}
    assert "cancelled" in told[5]["problem"]
    assert told[6]["problem"] is None


def undo_log(town: Town, peer: Peer) -> list[dict[str, Any]]:
    call = peer.start("undoLog", 0, -20)
    town.house.slow.run_all()
    town.house.beside.run_all()
    peer.read()
    found: list[dict[str, Any]] = list(call.result)
    return found


@pytest.mark.parametrize("together", [True, False], ids=["tpc_operate", "undoa"])
def test_an_undo_that_is_given_up_is_not_told(
    town: Town, tmp_path: Path, audit_file: AuditFile, together: bool
) -> None:
    town.open(**{"1": open_filestorage(tmp_path / "Data.fs")})
    peer = town.arrival("token write").register()
    peer.commit(A)
    peer.commit(A, data=b"other")
    (undoable, *_) = undo_log(town, peer)
    for end in ("tpc_abort", "tpc_finish"):
        id = end.encode()
        peer.begin(id)
        if together:
            peer.one_way("tpc_operate", id, None, [(4, None, None, undoable["id"], None)])
        else:
            peer.one_way("undoa", undoable["id"], id)
        peer._settled(peer.start("vote", id))
        peer.ask(end, id)
        told = [event["event"] for event in events(audit_file)]
        assert told.count("undid") == (end == "tpc_finish")
    assert peer.session.authority._undone == {}


def test_refusals_are_told_with_their_reason(town: Town, audit_file: AuditFile) -> None:
    town.open("token:read read 1", **two())
    town.arrival("token read").start("register", "secret", True)
    peer = town.arrival("token read").register(read_only=True)
    peer.start("pack", 1.0, True)
    town.stranger().start("register", "1", True)
    reasons = [event["reason"] for event in events(audit_file) if event["event"] == "refused"]
    assert reasons == [
        "there is no such storage, or it may not be read",
        "pack needs the role admin; token:read has read",
        "register: this server wants a certificate or a token first",
    ]


def test_names_forge_no_line(town: Town, caplog: pytest.LogCaptureFixture, audit_file: AuditFile) -> None:
    caplog.set_level(logging.INFO, "zeoid.server")
    name = 'a\n{"event": "connected"}\x1b[2J'
    peer = town.certified(name, "read").register(read_only=True)
    peer.start("pack", 1.0, True)
    for record in caplog.records:
        if record.name != "zeoid.audit":
            assert record.getMessage().isprintable()
    assert {event["name"] for event in events(audit_file)} == {name}


# The words --------------------------------------------------------------------------------------------


def test_an_unknown_storage_for_whoever_may_do_everything(town: Town) -> None:
    town.open(**two())
    call = town.arrival("trusted").start("register", "x", True)
    refuses(call, "unknown storage: 'x'; this server has '1', 'secret'")
    assert isinstance(call.problem, TypeError)
    assert not isinstance(call.problem, InvalidCall)


def test_every_access_is_a_role_that_has_it() -> None:
    for access in Access:
        assert access in roles.GRANTS[names.Role(access.value)]
