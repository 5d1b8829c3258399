"""Tokens and their file: what is in it, who can read it, which token is good."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

from zeoid import limits
from zeoid.errors import ConfigurationError
from zeoid.security import tokens
from zeoid.security.tokens import find, make, read, revoke

NOW = 1_700_000_000.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tokens.json"


def a_token(path: Path, name: str = "reports", **options: Any) -> str:
    given: dict[str, Any] = {"role": "read", "storages": [], "days": None, "now": NOW, **options}
    return make(path, name, **given)


# Making -----------------------------------------------------------------------------------------------


def test_what_a_token_looks_like(path: Path) -> None:
    token = a_token(path, "nightly.back_up-2")
    assert re.fullmatch(r"zeoid_nightly\.back_up-2_[A-Za-z0-9_-]{43}", token)
    longest = a_token(path, "n" * 64)
    assert len(longest) <= limits.TOKEN_CHARACTERS


def test_no_two_are_alike(path: Path) -> None:
    secrets = {a_token(path, f"t{number}").rpartition("_")[2][-20:] for number in range(20)}
    assert len(secrets) == 20


def test_the_file_has_hashes_only(path: Path) -> None:
    token = a_token(path)
    secret = token.removeprefix("zeoid_reports_")
    text = path.read_text()
    assert secret not in text
    assert hashlib.sha256(token.encode()).hexdigest() in text
    assert json.loads(text)["version"] == 1


def test_what_is_kept(path: Path) -> None:
    a_token(path, role="admin", storages=["1", "archive"], days=2)
    (token,) = read(path).values()
    assert (token.name, token.role, token.storages) == ("reports", "admin", ("1", "archive"))
    assert (token.made, token.expires, token.revoked) == (NOW, NOW + 2 * 86400, None)
    assert token.wrong(NOW) == ""
    assert token.wrong(NOW + 2 * 86400) == "has expired"


def test_only_its_owner_can_read_it(path: Path) -> None:
    before = os.umask(0)
    try:
        a_token(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        revoke(path, "reports", NOW)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    finally:
        os.umask(before)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o620])
def test_a_file_that_others_can_read_is_refused(path: Path, mode: int) -> None:
    a_token(path)
    path.chmod(mode)
    uses = lambda: tokens.watched(path), lambda: a_token(path, "x"), lambda: revoke(path, "reports", NOW)
    for use in uses:
        with pytest.raises(ConfigurationError) as caught:
            use()
        assert str(caught.value) == f"others can read {path}: chmod 600 {path}"
    path.chmod(0o600)
    assert list(read(path)) == ["reports"]


def test_opening_it_to_others_while_a_server_runs_is_told(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    a_token(path)
    now = [0.0]
    watched = tokens.watched(path, monotonic=lambda: now[0])
    path.chmod(0o644)
    now[0] += 2
    assert not watched.look()
    assert f"others can read {path}" in caplog.text
    assert list(watched.rules) == ["reports"]


def test_nothing_is_left_beside_it(path: Path) -> None:
    a_token(path)
    revoke(path, "reports", NOW)
    assert os.listdir(path.parent) == ["tokens.json"]


def test_a_name_is_used_once_until_it_is_no_good(path: Path) -> None:
    a_token(path, days=1)
    with pytest.raises(ConfigurationError, match="there is a token 'reports' already"):
        a_token(path)
    later = NOW + 2 * 86400
    second = make(path, "reports", "write", [], None, later)
    assert find(read(path), second) is not None
    revoke(path, "reports", later)
    third = a_token(path)
    assert find(read(path), second) is None
    assert find(read(path), third) is not None


@pytest.mark.parametrize("name", ["", "a b", "ä", "a/b", "-a", "_a", "x" * 65, "a\n", "a:b", "*"])
def test_what_can_not_be_a_name(path: Path, name: str) -> None:
    with pytest.raises(ConfigurationError, match="can't be a name"):
        a_token(path, name)
    assert not path.exists()


def test_revoking_what_there_is_not(path: Path) -> None:
    with pytest.raises(ConfigurationError, match="can't be read"):
        revoke(path, "reports", NOW)
    a_token(path)
    with pytest.raises(ConfigurationError, match="there is no token 'x'"):
        revoke(path, "x", NOW)
    revoke(path, "reports", NOW)
    with pytest.raises(ConfigurationError, match="revoked before"):
        revoke(path, "reports", NOW)


def test_commands_at_the_same_time_lose_nothing(path: Path) -> None:
    threads = [threading.Thread(target=a_token, args=(path, f"t{number}")) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(read(path)) == [f"t{number}" for number in range(8)]


def test_a_file_that_can_not_be_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_token(path)
    before = path.read_bytes()

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigurationError, match="can't be written: No space left"):
        a_token(path, "other")
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["tokens.json"]


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="nowhere can't be opened"):
        a_token(tmp_path / "nowhere" / "tokens.json")


# Showing ----------------------------------------------------------------------------------------------


def test_which_one_was_shown(path: Path) -> None:
    shown = {name: a_token(path, name) for name in ("reports", "reports_2", "reports_2_3")}
    known = read(path)
    for name, token in shown.items():
        found = find(known, token)
        assert found is not None
        assert found.name == name


def test_what_is_no_token(path: Path) -> None:
    token = a_token(path)
    other = a_token(path, "other")
    known = read(path)
    wrong = [
        "", "x", token[:-1], token + "A", token + "\n", " " + token, token.upper(), token[6:],
        token.replace("reports", "other"), token.replace("reports", "nobody"),
        other.replace("other", "reports"), "zeoid_reports_" + "A" * 43, "zeoid__" + "A" * 43,
        token * 1000, "\ud800", known["reports"].sha256.hex(),
    ]  # fmt: skip
    assert [shown for shown in wrong if find(known, shown) is not None] == []


def test_secrets_are_compared_as_hashes_and_in_constant_time(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = a_token(path)
    known = read(path)
    compared: list[tuple[bytes, bytes]] = []

    def watching(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return True

    monkeypatch.setattr(hmac, "compare_digest", watching)
    wrong = token[:-1] + ("A" if token[-1] != "A" else "B")
    # The comparison decides, and nothing before it.
    assert find(known, wrong) is known["reports"]
    assert compared == [(hashlib.sha256(wrong.encode()).digest(), known["reports"].sha256)]


def test_a_token_of_no_name_is_hashed_too(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_token(path)
    compared: list[Any] = []
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: bool(compared.append((a, b))))
    assert find(read(path), "zeoid_nobody_" + "A" * 43) is None
    assert len(compared) == 1


# The format -------------------------------------------------------------------------------------------

SOUND = {
    "sha256": "00" * 32, "role": "read", "storages": ["*"], "made": NOW, "expires": None, "revoked": None,
}  # fmt: skip


def test_a_sound_file() -> None:
    text = json.dumps({"version": 1, "tokens": {"a": SOUND}})
    assert tokens.parse(tokens.told(tokens.parse(text))) == tokens.parse(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no JSON"), ("{", "no JSON"), ("[]", "no file of tokens"), ("{}", "no file of tokens"),
        ('{"version": 2, "tokens": {}}', "version 2 is not known here"),
        ('{"version": "1", "tokens": {}}', "version '1' is not known"),
        ('{"version": 1}', "no tokens"), ('{"version": 1, "tokens": []}', "no tokens"),
        ("[" * 100_000, "nested too deep"),
    ],
)  # fmt: skip
def test_what_is_no_file_of_tokens(path: Path, text: str, words: str) -> None:
    path.touch(0o600)
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=re.escape(words)) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    "wrong",
    [
        {"sha256": "00" * 31}, {"sha256": "x"}, {"sha256": None}, {"role": "root"}, {"role": ["read"]},
        {"storages": []}, {"storages": "1"}, {"storages": [1]}, {"storages": None}, {"made": "today"},
        {"expires": "never"}, {"expires": float("nan")}, {"expires": True}, {"revoked": False}, {"made": -1},
    ],
    ids=str,
)  # fmt: skip
def test_a_token_that_is_not_sound(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="the token 'a' is not"):
        tokens.parse(json.dumps({"version": 1, "tokens": {"a": {**SOUND, **wrong}}}))


@pytest.mark.parametrize("missing", sorted(SOUND))
def test_a_token_that_is_not_complete(missing: str) -> None:
    fields = {key: value for key, value in SOUND.items() if key != missing}
    with pytest.raises(ValueError, match="the token 'a' is not complete"):
        tokens.parse(json.dumps({"version": 1, "tokens": {"a": fields}}))


def test_a_token_with_a_name_that_it_can_not_have() -> None:
    with pytest.raises(ValueError, match="is not as a token must be"):
        tokens.parse(json.dumps({"version": 1, "tokens": {"a b": SOUND}}))
