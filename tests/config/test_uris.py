"""`zeoid://` URIs: what they may say, and that zodburi knows them."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

import zeoid.client.storage
from zeoid.addresses import TcpAddress, UnixAddress
from zeoid.config import uris
from zeoid.errors import ConfigurationError


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[str, Any]]]:
    """The arguments of the client storages that are made, instead of which nothing is."""
    made: list[tuple[Any, dict[str, Any]]] = []
    monkeypatch.setattr(
        zeoid.client.storage, "ClientStorage", lambda addresses, **options: made.append((addresses, options))
    )
    return made


@pytest.mark.parametrize(
    ("uri", "addresses"),
    [
        ("zeoid://zoo:7700", [TcpAddress("zoo", 7700)]),
        ("zeoid://zoo:7700/", [TcpAddress("zoo", 7700)]),
        ("zeoid://zoo", [TcpAddress("zoo", 8100)]),
        ("zeoid://[::1]:7700", [TcpAddress("::1", 7700)]),
        ("zeoid://[::1]", [TcpAddress("::1", 8100)]),
        ("zeoid://a:1,b:2", [TcpAddress("a", 1), TcpAddress("b", 2)]),
        ("zeoid:///var/run/zoo%20socket", [UnixAddress("/var/run/zoo socket")]),
    ],
)
def test_addresses(made: list[tuple[Any, dict[str, Any]]], uri: str, addresses: list[Any]) -> None:
    factory, leftovers = uris.resolve(uri)
    factory()
    assert made == [(addresses, {})]
    assert leftovers == {}


def test_options(made: list[tuple[Any, dict[str, Any]]], tmp_path: Path) -> None:
    token_file = tmp_path / "token"
    token_file.write_text("zeoid_reports_secret\n")
    factory, leftovers = uris.resolve(
        "zeoid://zoo:7700?storage=temp&name=n&wait=false&wait_timeout=2.5&read_only=1&read_only_fallback=0"
        "&cache_size_bytes=50MB&client_label=a%20label&server_sync=true&coding=Z5&cache_dir=/var/cache/zoo"
        "&blob_dir=/var/blobs&shared_blob_dir=1&blob_cache_size=1GB&blob_cache_size_check=5"
        "&tls=/etc/app.pem&tls_key=/etc/app.key&tls_ca=system&tls_server_hostname=zoo.example.org"
        f"&token_file={token_file}&read_ahead=no"
        "&database_name=main&connection_pool_size=3"
    )
    factory()
    options = {
        "storage": "temp", "name": "n", "wait": False, "wait_timeout": 2.5, "read_only": True,
        "read_only_fallback": False, "cache_size_bytes": 50 * 1024 * 1024, "client_label": "a label",
        "server_sync": True, "cache_dir": "/var/cache/zoo", "coding": "Z5",
        "blob_dir": "/var/blobs", "shared_blob_dir": True,
        "blob_cache_size": 1024**3, "blob_cache_size_check": 5, "read_ahead": False,
        "tls": "/etc/app.pem", "tls_key": "/etc/app.key", "tls_ca": "system",
        "tls_server_hostname": "zoo.example.org", "token": "zeoid_reports_secret",
    }  # fmt: skip
    assert made == [([TcpAddress("zoo", 7700)], options)]
    # A token stands in no URI: those are printed, logged, and seen by whoever lists processes.
    assert options.keys() - {"token"} == uris.OPTIONS.keys() - {"token_file"}
    # For whoever opens a database with it.
    assert leftovers == {"database_name": "main", "connection_pool_size": "3"}


def test_nothing_is_opened_before_it_is_asked_for(made: list[tuple[Any, dict[str, Any]]]) -> None:
    uris.resolve("zeoid://zoo:7700")
    assert made == []


@pytest.mark.parametrize(
    ("uri", "what"),
    [
        ("zeo://zoo:7700", "no URI of the scheme zeoid"),
        ("zeoid:zoo:7700", "no URI of the scheme zeoid"),
        ("zeoid://", "names no server"),
        ("zeoid:///", "names no server"),
        ("zeoid://zoo:7700/temp", "behind a question mark"),
        ("zeoid://zoo:http", "no address"),
        ("zeoid://zoo:7700?wait_timeout=soon", "wait_timeout can't be 'soon'"),
        ("zeoid://zoo:7700?wait=perhaps", "wait can't be 'perhaps'"),
    ],
)
def test_what_is_refused(uri: str, what: str) -> None:
    with pytest.raises(ConfigurationError, match=what):
        uris.resolve(uri)


def test_zodburi_is_told_of_it() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["zodburi.resolvers"]["zeoid"].partition(":")
    assert (module, getattr(uris, name)) == (uris.__name__, uris.resolve)
