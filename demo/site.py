"""The site of the demo: one storage server on a Data.fs, and the Zopes that share it.

Owns the order in which they start. Must not know what is done with them.
"""

import secrets
import sys
from collections.abc import Callable
from dataclasses import dataclass

from demo.processes import Process, Workspace
from demo.zope import User, Zope, ZopeVenv, start_zope

ZOPES = ("Zope 1", "Zope 2", "Zope 3")
START_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Site:
    server: Process
    zopes: list[Zope]
    user: User


def start_site(workspace: Workspace, venv: ZopeVenv, announce: Callable[[str, str], None]) -> Site:
    """Start everything; each part's name and address is announced as soon as it is ready."""
    server, address = start_storage_server(workspace)
    announce(server.name, address)
    user = User("admin", secrets.token_hex(6))

    def start(name: str) -> Zope:
        return start_zope(workspace, venv, name, address, user, first=name == ZOPES[0])

    def wait(zope: Zope) -> Zope:
        zope.wait_until_ready()
        announce(zope.name, f"{zope.url}/manage")
        return zope

    # The first Zope alone: it fills the empty database, and two that do so at once would conflict.
    zopes = [wait(start(ZOPES[0]))]
    zopes += [wait(zope) for zope in [start(name) for name in ZOPES[1:]]]
    return Site(server, zopes, user)


def start_storage_server(workspace: Workspace) -> tuple[Process, str]:
    """Start the server; return it and the address that it listens on, HOST:PORT."""
    data = workspace.folder / "Data.fs"
    command = [sys.executable, "-m", "zeoid", "serve", "-h", "127.0.0.1", "-p", "0", str(data)]
    process = workspace.start("Storage server", command)
    listening = process.wait_for_line(r"listening on (127\.0\.0\.1:\d+)\s", START_TIMEOUT_S)
    return process, listening[1]
