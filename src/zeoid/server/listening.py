"""The addresses that a server listens on: what a name stands for, and sockets that nobody listens on.

Must not know what a server does with a connection.
"""

import asyncio
import ipaddress
import os
import socket
import stat

from zeoid.addresses import TcpAddress
from zeoid.errors import ConfigurationError
from zeoid.security.identity import LOCAL


def clear_stale_socket(path: str) -> None:
    """Remove a unix socket that nobody listens on any more."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigurationError(f"can't listen on {path}: it exists and is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except OSError:
            pass
    raise ConfigurationError(f"can't listen on {path}: another server listens there")


def where(transport: asyncio.BaseTransport) -> str:
    """The address of whoever has connected."""
    name = transport.get_extra_info("peername")
    return str(TcpAddress(name[0], name[1])) if isinstance(name, tuple) else LOCAL


async def hosts(address: TcpAddress) -> list[str] | None:
    """The addresses to bind: all that the name has, but only the first where the port is to be chosen."""
    if not address.host:
        return None
    found = await asyncio.get_running_loop().getaddrinfo(
        address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    each = list(dict.fromkeys(str(info[4][0]) for info in found))
    return each if address.port else each[:1]


def private_socket(path: str) -> socket.socket:
    """A unix socket that only this user can connect to. OSError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(path)
        os.chmod(path, 0o600)  # nobody can connect before it listens
    except BaseException:
        sock.close()
        raise
    return sock


def is_open(hosts: list[str] | None) -> bool:
    """Whether other machines may reach one of these addresses."""
    return hosts is None or not all(ipaddress.ip_address(host).is_loopback for host in hosts)


def refuse_open(address: TcpAddress, hosts: list[str] | None) -> None:
    """ConfigurationError if other machines may reach it."""
    if is_open(hosts):
        raise ConfigurationError(
            f"won't listen on {address} without TLS: whoever reaches it could read and change everything. "
            "Make certificates with `zeoid certs init` and give --tls, listen on localhost or a unix socket, "
            "or, if nobody but trusted machines can reach it, give --insecure"
        )


def why(problem: OSError | UnicodeError) -> str:
    """What to say of it; asyncio's own words have the address in them again."""
    number = getattr(problem, "errno", None)
    return os.strerror(number).lower() if number and number > 0 else str(problem)
