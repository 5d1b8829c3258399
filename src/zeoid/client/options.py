"""What the options of a client storage may be. Owns the refusals, in words for whoever wrote the options."""

import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from zeoid import limits
from zeoid.addresses import Address
from zeoid.cache.memory import MemoryCache
from zeoid.cache.shared import SharedCache
from zeoid.errors import ConfigurationError
from zeoid.ports import ObjectCache

if TYPE_CHECKING:
    from zeoid.security.tls import ClientContexts


def check_options(
    *,
    storage: Any,
    client_label: Any,
    token: Any,
    read_only: bool,
    read_only_fallback: bool,
    wait_timeout: Any,
    cache_size_bytes: Any,
    cache_dir: Any,
    coding: Any,
) -> None:
    """ConfigurationError if one of them can't be. Those of blobs are `blobs`' business."""
    if read_only and read_only_fallback:
        raise ConfigurationError("read_only and read_only_fallback exclude each other")
    if coding not in (None, "M5", "Z5"):
        raise ConfigurationError(f"coding must be M5 or Z5, not {coding!r}")
    if not isinstance(storage, str) or not isinstance(client_label, str):
        raise ConfigurationError("the names of a storage and of a client must be text")
    if token is not None and not (
        isinstance(token, str) and token.isascii() and len(token) <= limits.TOKEN_CHARACTERS
    ):
        # It is not shown: messages end up in logs.
        raise ConfigurationError("the token is not one that `zeoid tokens make` has printed")
    if wait_timeout is not None and not (isinstance(wait_timeout, int | float) and wait_timeout > 0):
        raise ConfigurationError(f"wait_timeout must be a number of seconds, not {wait_timeout!r}")
    if cache_dir is not None and (not isinstance(cache_dir, str | os.PathLike) or not os.fspath(cache_dir)):
        raise ConfigurationError(f"cache_dir must be a directory, not {cache_dir!r}")
    if cache_size_bytes is None:
        return
    if not isinstance(cache_size_bytes, int) or cache_size_bytes < 0:
        raise ConfigurationError(f"cache_size_bytes must be a number of bytes, not {cache_size_bytes!r}")
    if cache_dir is not None and cache_size_bytes < limits.SHARED_CACHE_LEAST_BYTES:
        raise ConfigurationError(
            f"in a cache_dir, cache_size_bytes must be {limits.SHARED_CACHE_LEAST_BYTES:,} at least, "
            f"not {cache_size_bytes:,}"
        )


def cache_maker(
    cache_dir: Any, cache_size_bytes: int | None, storage: str, addresses: Iterable[Address]
) -> Callable[[bytes], ObjectCache]:
    """What makes an object cache, for a process that was told everything up to the tid that it is given."""
    if cache_dir is None:
        size_bytes = limits.CACHE_BYTES if cache_size_bytes is None else cache_size_bytes
        return lambda told: MemoryCache(size_bytes)
    size_bytes = limits.SHARED_CACHE_BYTES if cache_size_bytes is None else cache_size_bytes
    # The same words in every process, in whatever order it was given the servers.
    key = f"{storage} at {', '.join(sorted(map(str, addresses)))}"
    return lambda told: SharedCache(cache_dir, key, size_bytes, told)


def certificates_for(
    tls: Any, tls_key: Any, tls_ca: Any, tls_server_hostname: Any
) -> "ClientContexts | None":
    """What TLS connections are made with; None if there are to be none. ConfigurationError."""
    if tls is None and tls_key is None and tls_ca is None:
        if tls_server_hostname is not None:
            raise ConfigurationError("tls_server_hostname is nothing without tls or tls_ca")
        return None
    # The module ssl takes time to load, and not everybody needs it.
    from zeoid.security.tls import ClientContexts, ClientTls

    if isinstance(tls, ClientTls):
        if tls_key is not None or tls_ca is not None or tls_server_hostname is not None:
            raise ConfigurationError("with a ClientTls there are no other options of TLS: it has them all")
        return ClientContexts(tls)
    for name, file in (("tls", tls), ("tls_key", tls_key), ("tls_ca", tls_ca)):
        if file is not None and (not isinstance(file, str | os.PathLike) or not os.fspath(file)):
            raise ConfigurationError(f"{name} must be the path of a file in PEM, not {file!r}")
    if tls_server_hostname is not None and not isinstance(tls_server_hostname, str):
        raise ConfigurationError(f"tls_server_hostname must be a name, not {tls_server_hostname!r}")
    return ClientContexts(
        ClientTls(
            certificate=None if tls is None else os.fspath(tls),
            key=None if tls_key is None else os.fspath(tls_key),
            ca=None if tls_ca is None else os.fspath(tls_ca),
            server_hostname=tls_server_hostname,
        )
    )
