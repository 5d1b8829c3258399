"""Options of servers and clients that say who is let in: from files, variables and arguments."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import pytest

from tests.certificates import Authority
from zeoid.config.securing import ENVIRONMENT, Securing, client_options, read_token
from zeoid.config.serving import read_configuration
from zeoid.errors import ConfigurationError
from zeoid.security import tokens
from zeoid.security.names import Role


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


# Of a server -------------------------------------------------------------------------------------------


def test_nothing_is_wanted_by_default() -> None:
    options = Securing().server_options()
    assert options["tls"] is None
    assert options["insecure"] is False


def test_a_certificate_is_wanted_unless_there_are_tokens(authority: Authority, tmp_path: Path) -> None:
    bundle, file = authority.server(), tmp_path / "tokens.json"
    assert Securing(tls=bundle).server_options()["tls"].tls.certificate_required
    tokens.make(file, "reports", "read", (), None, time.time())
    options = Securing(tls=bundle, tokens=str(file)).server_options()
    assert not options["tls"].tls.certificate_required


@pytest.mark.parametrize("name", ["tls_key", "tls_ca", "tls_revoked"])
def test_what_is_nothing_without_a_certificate(name: str) -> None:
    with pytest.raises(ConfigurationError, match=name.replace("_", "-")):
        Securing(**{name: "file"}).server_options()


@pytest.mark.parametrize("name", ["tls", "tokens", "access"])
def test_a_file_that_is_not_there(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"(?i)no such file or directory") as caught:
        Securing(**{name: str(tmp_path / "missing")}).server_options()
    assert "missing" in str(caught.value)


def test_a_default_role_that_there_is_not() -> None:
    with pytest.raises(ConfigurationError, match="can't be 'root'; there are read, write, admin, replica"):
        Securing(default_role="root").server_options()


def test_the_default_role() -> None:
    assert Securing(default_role="read").server_options()["policy"]._default_role is Role.READ


# A configuration file ----------------------------------------------------------------------------------


def configured(folder: Path, keys: str, ssl: str = "") -> Any:
    path = folder / "zeo.conf"
    section = f"<ssl>\n{ssl}\n</ssl>\n" if ssl else ""
    zeo = f"<zeo>\naddress localhost:0\n{keys}\n{section}</zeo>\n"
    path.write_text(f"{zeo}<mappingstorage>\n</mappingstorage>\n")
    return read_configuration(str(path)).security


def test_a_section_as_zeo_has_it(authority: Authority, tmp_path: Path) -> None:
    """Certificate and key in files of their own, and the clients' authority."""
    key, certificate, _ = authority.issue("server", "localhost", server=True)
    files = {
        "certificate": authority.write("server.crt", certificate), "key": authority.write("server.key", key),
        "authenticate": authority.file,
    }  # fmt: skip
    found = configured(tmp_path, "", "\n".join(f"{name} {file}" for name, file in files.items()))
    assert found == Securing(
        tls=files["certificate"], tls_key=files["key"], tls_ca=files["authenticate"]
    )
    assert found.server_options()["tls"].tls.ca == authority.file


def test_all_the_keys(tmp_path: Path) -> None:
    keys = "tokens t\naccess a\naudit-log l\ndefault-role read\ninsecure yes"
    assert configured(tmp_path, keys, "certificate c\nrevoked r") == Securing(
        tls="c", tls_revoked="r", tokens="t", access="a", audit_log="l", default_role="read", insecure=True
    )


@pytest.mark.parametrize(("ssl", "words"), [
    ("certificate c\npassword-function os.getpid", "a private key with a password is not read"),
    ("certificate c\nauthenticate {folder}", "is a directory: name one file with all the certificates"),
    ("key k", "certificate"),
    ("certificate c\nserver-hostname x", "server-hostname"),
])  # fmt: skip
def test_what_is_refused_with_its_line(tmp_path: Path, ssl: str, words: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        configured(tmp_path, "", ssl.format(folder=tmp_path))
    assert words in str(caught.value)
    assert "zeo.conf" in str(caught.value)
    assert "\n" not in str(caught.value)


# Of a client -------------------------------------------------------------------------------------------


def test_each_variable(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(" zeoid_x_y\n")
    values = {variable: f"a {name}" for variable, name in ENVIRONMENT.items()}
    del values["ZEOID_TOKEN_FILE"]
    assert client_options({}, values) == {
        "tls": "a tls", "tls_key": "a tls_key", "tls_ca": "a tls_ca",
        "tls_server_hostname": "a tls_server_hostname", "token": "a token",
    }  # fmt: skip
    assert client_options({}, {"ZEOID_TOKEN_FILE": str(tmp_path / "token")}) == {"token": "zeoid_x_y"}
    assert client_options({}, {"ZEOID_TLS": "", "ZEOID_TOKEN": ""}) == {}


def test_arguments_count_more_than_variables(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("zeoid_x_y")
    file = str(tmp_path / "token")
    assert client_options({"tls": "one", "tls_ca": None}, {"ZEOID_TLS": "two"}) == {"tls": "one"}
    assert client_options({"token_file": file}, {"ZEOID_TOKEN": "other"}) == {"token": "zeoid_x_y"}
    assert client_options({"token": "mine"}, {"ZEOID_TOKEN_FILE": "/nowhere"}) == {"token": "mine"}


def test_a_token_and_a_file_of_one(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("zeoid_x_y")
    with pytest.raises(ConfigurationError, match="not both"):
        client_options({}, {"ZEOID_TOKEN": "other", "ZEOID_TOKEN_FILE": str(tmp_path / "token")})


@pytest.mark.parametrize("content", [b"", b"\n", b"two words", b"one\ntwo", b"\xff"])
def test_a_file_that_has_no_token(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "token"
    file.write_bytes(content)
    with pytest.raises(ConfigurationError, match="there is no token in"):
        read_token(str(file))


def test_a_token_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"can't read .*: No such file"):
        read_token(str(tmp_path / "missing"))


def test_nothing_of_it_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    (tmp_path / "token").write_text("zeoid_x_secret")
    client_options({"token_file": str(tmp_path / "token")}, {})
    assert "secret" not in caplog.text
