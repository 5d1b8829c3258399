"""`%import zeoid`: the section `<zeoid>` in configuration files of ZODB."""

from __future__ import annotations

from contextlib import closing
from inspect import signature
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import transaction
import ZConfig
import ZODB.config

import zeoid
from zeoid.addresses import TcpAddress, UnixAddress
from zeoid.config import component, uris
from zeoid.errors import ConfigurationError

COMPONENT = Path(zeoid.__file__).with_name("component.xml")


def section(lines: str) -> Any:
    """The section with these lines, as a schema that has storages reads it."""
    config, _ = ZConfig.loadConfigFile(_schema(), _file(f"%import zeoid\n<zeoid>\n{lines}\n</zeoid>\n"))
    return config.storage


def _schema() -> Any:
    return ZODB.config.getStorageSchema()


def _file(text: str) -> Any:
    import io

    return io.StringIO(text)


def test_a_database_that_a_file_describes(tmp_path: Path) -> None:
    text = """
        %import zeoid
        <zodb main>
          <zeoid>
            server {}
            client-label zoo1
            cache-size 30MB
          </zeoid>
        </zodb>
    """
    with zeoid.serve(None) as server:
        with closing(ZODB.config.databaseFromString(text.format(server.address))) as database:
            assert database.storage.cache_statistics()["size_bytes"] == 30 * 1024 * 1024
            with database.transaction() as connection:
                connection.root()["tiger"] = "striped"
        with closing(zeoid.DB(server.address)) as database, closing(database.open()) as connection:
            transaction.begin()
            assert connection.root()["tiger"] == "striped"


def test_every_key(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("zeoid_x_y\n")
    found = section(f"""
        server zoo1:7700
        server zoo2:7700 [::1]:7701
        server /var/run/zoo
        storage temp
        name zoo
        cache-dir /var/cache/zoo
        cache-size 1GB
        tls /etc/zoo/zope1.pem
        tls-key /etc/zoo/key.pem
        tls-ca system
        tls-server-hostname zoo
        token-file {token}
        wait no
        wait-timeout 2.5
        read-only yes
        read-only-fallback no
        client-label a label
        server-sync on
        read-ahead off
        coding Z5
        blob-dir /var/blobs
        shared-blob-dir on
        blob-cache-size 2GB
        blob-cache-size-check 5
    """)
    assert found.addresses() == [
        TcpAddress("zoo1", 7700), TcpAddress("zoo2", 7700), TcpAddress("::1", 7701),
        UnixAddress("/var/run/zoo"),
    ]  # fmt: skip
    assert found.options() == {
        "storage": "temp", "name": "zoo", "cache_dir": "/var/cache/zoo", "cache_size_bytes": 1024**3,
        "tls": "/etc/zoo/zope1.pem", "tls_key": "/etc/zoo/key.pem", "tls_ca": "system",
        "tls_server_hostname": "zoo", "token": "zeoid_x_y", "wait": False, "wait_timeout": 2.5,
        "read_only": True, "read_only_fallback": False, "client_label": "a label", "server_sync": True,
        "read_ahead": False, "coding": "Z5", "blob_dir": "/var/blobs", "shared_blob_dir": True,
        "blob_cache_size": 2 * 1024**3, "blob_cache_size_check": 5,
    }  # fmt: skip
    arguments = set(signature(zeoid.ClientStorage.__init__).parameters) - {"self", "addr"}
    assert set(found.options()) == arguments, "every argument of a client can be configured"


def test_what_is_left_out_is_left_to_the_client() -> None:
    found = section("server zoo:7700").options()
    defaults = signature(zeoid.ClientStorage.__init__).parameters
    assert {name: defaults[name].default for name in found} == found


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("", "not enough values for 'server'"),
        ("server zoo", "is no address"),
        ("server zoo:http", "is no address"),
        ("server zoo:7700\nservers zoo:7700", "servers"),
        ("server zoo:7700\nwait-timeout 0", "is no time in seconds"),
        ("server zoo:7700\ncache-size much", "much"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(lines: str, words: str) -> None:
    with pytest.raises(ZConfig.ConfigurationError) as caught:
        section(lines)
    assert words in str(caught.value)


def test_a_token_that_is_not_there(tmp_path: Path) -> None:
    found = section(f"server zoo:7700\ntoken-file {tmp_path / 'none'}")
    with pytest.raises(ConfigurationError, match="can't read"):
        found.open()


def test_uris_have_the_same_options() -> None:
    keys = {key.get("name", "").replace("-", "_") for key in ElementTree.parse(COMPONENT).iter("key")}
    assert {component._ARGUMENTS.get(key, key) for key in keys} == set(uris.OPTIONS)
