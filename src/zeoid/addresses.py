"""Addresses of storage servers, as people write them: host and port, or the path of a unix socket."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from zeoid.errors import ConfigurationError

#: The port that ZEO's documentation uses, which is not registered to anyone.
DEFAULT_PORT = 8100


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """A host name or an IPv4 or IPv6 address, and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """The path of a unix socket."""

    path: str

    def __str__(self) -> str:
        return self.path


Address = TcpAddress | UnixAddress


def parse_address(text: str) -> Address:
    """`host:port`, `[ipv6]:port`, `:port` (every interface) or a path with a slash in it.

    ConfigurationError for anything else.
    """
    if "/" in text:
        return UnixAddress(text)
    host, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ConfigurationError(
            f"{text!r} is no address: write host:port, [ipv6]:port or the path of a socket"
        )
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ConfigurationError(f"{text!r} is no address: put an IPv6 address in brackets, as in [::1]:8100")
    return TcpAddress(host, int(port))


def parse_addresses(value: Any) -> tuple[Address, ...]:
    """What `ClientStorage` takes: (host, port), a text, a port on this machine, or a list of these."""
    if isinstance(value, bool):
        raise ConfigurationError(f"{value!r} is no address")
    if isinstance(value, int):
        value = ("127.0.0.1", value)
    if isinstance(value, str):
        addresses = [parse_address(part) for part in value.replace(",", " ").split()]
    elif _is_pair(value):
        addresses = [TcpAddress(value[0] or "127.0.0.1", _port(value[1]))]
    elif isinstance(value, TcpAddress | UnixAddress):
        addresses = [value]
    elif isinstance(value, Iterable):
        addresses = [address for part in value for address in parse_addresses(part)]
    else:
        raise ConfigurationError(f"{value!r} is no address")
    if not addresses:
        raise ConfigurationError("no address of a storage server is given")
    return tuple(addresses)


def _port(value: int) -> int:
    if not 0 <= value <= 65535:
        raise ConfigurationError(f"{value} is no port (0 to 65535)")
    return value


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) == 2
        and isinstance(value[0], str)
        and isinstance(value[1], int)
        and not isinstance(value[1], bool)
    )
