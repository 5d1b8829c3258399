"""Servers to be attacked, and what those who attack them and those who don't connect with."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.certificates import Authority
from tests.hostile.attacks import Target, prepare
from tests.server.processes import Serving
from tests.server.sockets import Bystander
from zeoid.security import tokens


def context(authority: Authority, name: str) -> ssl.SSLContext:
    """What the client of that name connects with."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.load_cert_chain(authority.client(name))
    made.load_verify_locations(authority.file)
    return made


class House:
    """A server with a data file and blobs, an attacker's way in, and that of others."""

    def __init__(self, folder: Path, serve: Callable[..., Serving], *options: Any, tls: bool) -> None:
        self.folder = folder
        self.authority: Authority | None = None
        secured: list[Any] = []
        if tls:
            self.authority = Authority(folder)
            known = folder / "tokens.json"
            tokens.make(known, "somebody", "write", (), None, time.time())
            secured = ["--tls", self.authority.server(), "--tokens", known]
        self.serving = serve(
            "-h", "127.0.0.1", "-p", "0", "--blob-dir", "blobs", "--audit-log", "audit.log", *secured,
            *options, "Data.fs",
        )  # fmt: skip
        self.address = self.serving.address
        self.attacker = self.target("mallory")
        prepare(self.target("alice"))

    def target(self, name: str) -> Target:
        assert isinstance(self.address, tuple)
        return Target(self.address, context(self.authority, name) if self.authority else None)

    def bystander(self) -> Bystander:
        return Bystander(self.address, client=self.target("alice").connect())
