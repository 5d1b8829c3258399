"""What the options of a client storage may be. Owns the refusals, in words for whoever wrote the options."""

from typing import Any

from zeoid.errors import ConfigurationError


def check_options(
    *,
    storage: Any,
    client_label: Any,
    read_only: bool,
    read_only_fallback: bool,
    wait_timeout: Any,
    cache_size_bytes: Any,
    coding: Any,
) -> None:
    """ConfigurationError if one of them can't be. Those of blobs are `blobs`' business."""
    if read_only and read_only_fallback:
        raise ConfigurationError("read_only and read_only_fallback exclude each other")
    if coding not in (None, "M5", "Z5"):
        raise ConfigurationError(f"coding must be M5 or Z5, not {coding!r}")
    if not isinstance(storage, str) or not isinstance(client_label, str):
        raise ConfigurationError("the names of a storage and of a client must be text")
    if wait_timeout is not None and not (isinstance(wait_timeout, int | float) and wait_timeout > 0):
        raise ConfigurationError(f"wait_timeout must be a number of seconds, not {wait_timeout!r}")
    if not isinstance(cache_size_bytes, int) or cache_size_bytes < 0:
        raise ConfigurationError(f"cache_size_bytes must be a number of bytes, not {cache_size_bytes!r}")
