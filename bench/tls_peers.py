"""The peers with TLS: mutual certificates, TLS 1.3, the ciphers that Python's ssl module chooses.

Owns what they need besides what the plain ones do. Must not know what is measured.
"""

import socket
import ssl
import sys
from pathlib import Path
from typing import Any

from tests.certificates import Authority

from bench.peers import CONNECT_TIMEOUT_S, HOST, PEERS, ZEO, Bare, PingPong, Zeoid, blocking_socket
from bench.processes import PROJECT, ServerProcess, listening_port


class _Certified:
    """A server's bundle and a client's, of the same new authority."""

    def __init__(self, folder: Path) -> None:
        (folder / "certificates").mkdir()
        self.authority = Authority(folder / "certificates")
        self.server, self.client = self.authority.server(), self.authority.client()

    def context(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self.authority.file)
        context.load_cert_chain(self.client)
        return context


class BareTls(Bare):
    """The bare ping-pong over the ssl module's blocking sockets."""

    name = "bare_tls"
    title = "bare TLS"

    def start(self, folder: Path) -> str:
        self._certified = _Certified(folder)
        program = str(PROJECT / "bench" / "bare_server.py")
        sizes = [str(PingPong.REQUEST_SIZE), str(PingPong.REPLY_SIZE)]
        command = [sys.executable, program, *sizes, self._certified.server]
        self.server = ServerProcess(command, folder / "bare.log")
        port = self.server.wait_for(rf"listening on {HOST}:(\d+)")[1]
        return f"{HOST}:{port}"

    def client(self, address: str, blob_cache: Path | None = None) -> Any:
        return TlsPingPong(address, self._certified.context())


class TlsPingPong(PingPong):
    def __init__(self, address: str, context: ssl.SSLContext) -> None:
        host, _, port = address.rpartition(":")
        plain = blocking_socket((host, int(port)))
        self._socket: socket.socket = context.wrap_socket(plain, server_hostname=host)
        self._request = bytes(self.REQUEST_SIZE)


class ZeoTls(ZEO):
    """ZEO with its `<ssl>` section, and an SSLContext for its client."""

    name = "zeo_tls"
    title = "ZEO, TLS"

    def start(self, folder: Path) -> str:
        self._certified = certified = _Certified(folder)
        key, certificate, _ = certified.authority.issue("zeo", HOST, server=True)
        section = (
            f"  <ssl>\n    certificate {certified.authority.write('zeo.pem', certificate)}\n"
            f"    key {certified.authority.write('zeo-key.pem', key)}\n"
            f"    authenticate {certified.authority.file}\n  </ssl>\n"
        )
        configuration = folder / "zeo.conf"
        configuration.write_text(
            f"<zeo>\n  address {HOST}:0\n  msgpack true\n{section}</zeo>\n"
            f"<filestorage 1>\n  path {folder / 'Data.fs'}\n</filestorage>\n"
        )
        command = [sys.executable, "-m", "ZEO.runzeo", "-C", str(configuration)]
        self.server = ServerProcess(command, folder / "zeo.log")
        self.server.wait_for("listening on")
        return f"{HOST}:{listening_port(self.server.pid)}"

    def client(self, address: str, blob_cache: Path | None = None) -> Any:
        from ZEO.ClientStorage import ClientStorage  # type: ignore[import-untyped]

        host, _, port = address.rpartition(":")
        return ClientStorage((host, int(port)), wait_timeout=CONNECT_TIMEOUT_S, ssl=self._certified.context())


class ZeoidTls(Zeoid):
    """Zeoid with a bundle at each end."""

    name = "zeoid_tls"
    title = "Zeoid, TLS"

    def start(self, folder: Path) -> str:
        self._certified = _Certified(folder)
        program = str(PROJECT / "bench" / "tls_server.py")
        command = [sys.executable, program, str(folder / "Data.fs"), self._certified.server]
        self.server = ServerProcess(command, folder / "zeoid.log")
        port = self.server.wait_for(rf"listening on {HOST}:(\d+)")[1]
        return f"{HOST}:{port}"

    def client(self, address: str, blob_cache: Path | None = None) -> Any:
        from zeoid import ClientStorage

        return ClientStorage(address, wait_timeout=CONNECT_TIMEOUT_S, tls=self._certified.client)


#: Whoever imports this module has them among the others.
PEERS.update({peer.name: peer for peer in (BareTls, ZeoTls, ZeoidTls)})
