"""TLS with ZEO's own server and client at the other end."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest
import transaction
import ZODB
from ZODB.blob import Blob

from tests.blobserver import BlobServer
from tests.certificates import Authority
from tests.peers import Peers
from zeoid.security.tls import ServerTls


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    (tmp_path / "certificates").mkdir()
    return Authority(tmp_path / "certificates")


CONTENT = bytes(range(256)) * 2000


def write(database: ZODB.DB) -> None:
    manager = transaction.TransactionManager()
    root = database.open(manager).root()
    root["page"] = "text"
    root["picture"] = Blob(CONTENT)
    manager.commit()
    manager.abort()
    database.close()


def check(database: ZODB.DB) -> None:
    manager = transaction.TransactionManager()
    root = database.open(manager).root()
    assert root["page"] == "text"
    with root["picture"].open() as file:
        assert file.read() == CONTENT
    manager.abort()
    database.close()


def test_zeos_client(peers: Peers, authority: Authority) -> None:
    server = BlobServer(peers.folder(), tls=ServerTls(authority.server()))
    context = ssl.create_default_context(cafile=authority.file)
    context.load_cert_chain(authority.client())
    stock = {"ssl": context, "ssl_server_hostname": "localhost"}
    ours = {"tls": authority.client("ours")}
    try:
        write(peers.database("stock", server.address, blob_dir=str(peers.folder()), **stock))
        check(peers.database("zeoid", server.address, blob_dir=str(peers.folder()), **ours))
        write(peers.database("zeoid", server.address, blob_dir=str(peers.folder()), **ours))
        check(peers.database("stock", server.address, blob_dir=str(peers.folder()), **stock))
    finally:
        server.stop()


def test_zeos_server(peers: Peers, authority: Authority) -> None:
    key, certificate, _ = authority.issue("server", "127.0.0.1", server=True)
    section = f"""
        <ssl>
          certificate {authority.write("stock.pem", certificate)}
          key {authority.write("stock-key.pem", key)}
          authenticate {authority.file}
        </ssl>
    """
    server = peers.server("stock", blobs="bushy", tls=section)
    ours = {"tls": authority.client()}
    write(peers.database("zeoid", server.address, blob_dir=str(peers.folder()), **ours))
    check(peers.database("zeoid", server.address, blob_dir=str(peers.folder()), **ours))
