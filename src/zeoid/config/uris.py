"""Storage URIs: `zeoid://host:port?storage=1`, also for everything that takes URIs through zodburi.

Owns how such a URI is read. Knows nothing of other schemes, and does not need zodburi to be installed.
"""

from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import ZConfig.datatypes

from zeoid.addresses import DEFAULT_PORT, Address, UnixAddress, parse_address
from zeoid.config.securing import read_token
from zeoid.errors import ConfigurationError

SCHEME = "zeoid"

_boolean = ZConfig.datatypes.stock_datatypes["boolean"]
_byte_size = ZConfig.datatypes.stock_datatypes["byte-size"]


def _yes_or_no(text: str) -> bool:
    return text == "1" or (text != "0" and bool(_boolean(text)))


#: What may stand behind the question mark: arguments of `ClientStorage`.
OPTIONS: dict[str, Callable[[str], Any]] = {
    "storage": str,
    "name": str,
    "wait": _yes_or_no,
    "wait_timeout": float,
    "read_only": _yes_or_no,
    "read_only_fallback": _yes_or_no,
    "cache_size_bytes": _byte_size,
    "cache_dir": str,
    "client_label": str,
    "tls": str,
    "tls_key": str,
    "tls_ca": str,
    "tls_server_hostname": str,
    "token_file": str,
    "server_sync": _yes_or_no,
    "read_ahead": _yes_or_no,
    "coding": str,
    "blob_dir": str,
    "shared_blob_dir": _yes_or_no,
    "blob_cache_size": _byte_size,
    "blob_cache_size_check": int,
}


def resolve(uri: str, defaults: Mapping[str, Any] | None = None) -> tuple[Callable[[], Any], dict[str, str]]:
    """What zodburi wants of a resolver: a function that opens the storage, and the arguments not taken.

    `zeoid://HOST[:PORT][,HOST[:PORT]…][?OPTIONS]`, or `zeoid:///path/of/socket[?OPTIONS]`. ConfigurationError
    if it is neither. *defaults*: arguments of `ClientStorage` that hold where the URI has no option.
    """
    addresses = _addresses(uri)
    leftovers = dict(parse_qsl(urlsplit(uri).query, keep_blank_values=True))
    options = {}
    for name, convert in OPTIONS.items():
        if name in leftovers:
            text = leftovers.pop(name)
            try:
                options[name] = convert(text)
            except ValueError:
                raise ConfigurationError(f"{uri}: {name} can't be {text!r}") from None

    if "token_file" in options:
        options["token"] = read_token(options.pop("token_file"))
    options = {**(defaults or {}), **options}

    def factory() -> Any:
        from zeoid.client.storage import ClientStorage

        return ClientStorage(addresses, **options)

    return factory, leftovers


def _addresses(uri: str) -> list[Address]:
    parts = urlsplit(uri)
    if parts.scheme != SCHEME or not uri.startswith(f"{SCHEME}://"):
        raise ConfigurationError(f"{uri!r} is no URI of the scheme {SCHEME}")
    if not parts.netloc:
        if len(parts.path) < 2:
            raise ConfigurationError(
                f"{uri!r} names no server: write zeoid://host:port, or zeoid:///path/of/socket"
            )
        return [UnixAddress(unquote(parts.path))]
    if parts.path not in ("", "/"):
        raise ConfigurationError(
            f"{uri!r}: the name of a storage goes behind a question mark, as ?storage=NAME"
        )
    return [
        parse_address(text if _has_port(text) else f"{text}:{DEFAULT_PORT}")
        for text in parts.netloc.split(",")
    ]


def _has_port(text: str) -> bool:
    return ":" in text.rpartition("]")[2]
