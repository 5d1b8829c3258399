"""What `zeoid serve` is to do, as one frozen object, from options or from a configuration file.

A configuration file is a ZConfig file as ZEO's `runzeo -C` takes it: a `<zeo>` section and one or more
storage sections, `%import`s and an `<eventlog>`. Owns its reading; knows nothing of servers.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

import ZConfig
from ZConfig.datatypes import SocketBindingAddress
from ZODB.config import BlobStorage, FileStorage

from zeoid import limits
from zeoid.addresses import DEFAULT_PORT, Address, TcpAddress, UnixAddress
from zeoid.config.securing import Securing
from zeoid.engines.opening import check_data_file, open_filestorage, open_memory, open_storage
from zeoid.errors import ConfigurationError
from zeoid.model import frozen
from zeoid.ports import Engine


@frozen
class ServingOptions:
    """Everything `zeoid serve` needs to know. Storages are opened by calling what stands for them."""

    addresses: tuple[Address, ...] = (TcpAddress("localhost", DEFAULT_PORT),)
    storages: dict[str, Callable[[], Engine]] = field(default_factory=dict)
    read_only: bool = False
    offer: str = "Z5"
    transaction_timeout_s: float = limits.TRANSACTION_TIMEOUT_S
    invalidation_log_transactions: int = limits.INVALIDATION_LOG_TRANSACTIONS
    resolve_conflicts: bool = False
    security: Securing = Securing()
    max_connections: int = limits.CONNECTIONS
    max_connections_each: int = limits.CONNECTIONS_PER_IDENTITY
    max_memory_bytes: int = limits.HELD_BYTES
    max_blob_bytes: int = limits.BLOB_BYTES
    pid_file: Path | None = None
    start_log: Callable[[], None] | None = None


def storages_of_path(
    path: str | None, *, memory: bool, read_only: bool, blob_dir: str | None = None
) -> dict[str, Callable[[], Engine]]:
    """The one storage, "1", of a server that was given a path, `--memory` or neither."""
    if memory:
        if path is not None:
            raise ConfigurationError("give a data file or --memory, not both")
        if blob_dir is not None:
            raise ConfigurationError("--blob-dir goes with a data file: nothing of --memory is kept")
        return {"1": open_memory}
    found = Path(path) if path is not None else _instance_data_file()
    return {"1": lambda: open_filestorage(found, blob_dir=blob_dir, read_only=read_only)}


def _instance_data_file() -> Path:
    """`var/Data.fs`, if this is a Zope instance: there is a `var` folder and a Zope configuration or data."""
    home = Path(os.environ.get("INSTANCE_HOME", "."))
    marks = (home / "etc" / "zope.conf", home / "etc" / "zope.ini", home / "var" / "Data.fs")
    if (home / "var").is_dir() and any(mark.exists() for mark in marks):
        return home / "var" / "Data.fs"
    raise ConfigurationError(
        "which data file? Give its path (zeoid serve Data.fs), start in a Zope instance, or use --memory"
    )


def read_configuration(path: str) -> ServingOptions:
    """The options in the ZConfig file *path*. ConfigurationError names the file and the line."""
    try:
        with open(path, encoding="utf-8") as file:
            config, _ = ZConfig.loadConfigFile(_schema(), file, url=Path(path).resolve().as_uri())
    except OSError as problem:
        raise ConfigurationError(f"can't read {path}: {problem.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigurationError(f"can't read {path}: it is no UTF-8 text") from None
    except ZConfig.ConfigurationError as problem:
        raise ConfigurationError(f"{path}: {_one_line(problem)}") from None
    except ImportError as problem:
        raise ConfigurationError(f"{path}: a component that it imports is not installed: {problem}") from None
    zeo = config.zeo
    return ServingOptions(
        addresses=(zeo.address,),
        storages=_storages(path, config.storages),
        read_only=zeo.read_only,
        offer="M5" if zeo.msgpack else "Z5",
        transaction_timeout_s=zeo.transaction_timeout,
        invalidation_log_transactions=zeo.invalidation_queue_size,
        resolve_conflicts=not zeo.client_conflict_resolution,
        security=_security(zeo),
        max_connections=zeo.max_connections,
        max_connections_each=zeo.max_connections_each,
        max_memory_bytes=zeo.max_memory * 1024**2,
        max_blob_bytes=zeo.max_blob * 1024**2,
        pid_file=Path(zeo.pid_filename) if zeo.pid_filename else None,
        start_log=_log_starter(path, config.eventlog),
    )


def _security(zeo: Any) -> Securing:
    ssl = zeo.ssl
    return Securing(
        tls=ssl and ssl.certificate,
        tls_key=ssl and ssl.key,
        tls_ca=ssl and ssl.authenticate,
        tls_revoked=ssl and ssl.revoked,
        tokens=zeo.tokens,
        access=zeo.access,
        audit_log=zeo.audit_log,
        default_role=zeo.default_role,
        insecure=zeo.insecure,
    )


def _schema() -> Any:
    return ZConfig.loadSchema(str(Path(__file__).with_name("schema.xml")))


def _one_line(problem: ZConfig.ConfigurationError) -> str:
    line = getattr(problem, "lineno", None)
    text = " ".join(str(getattr(problem, "message", problem)).split())
    return f"line {line}: {text}" if line else text


# The data types of the schema: a ValueError is told with file and line.


def listening_address(text: str) -> Address:
    """`host:port`, a port, or the path of a unix socket, as ZEO takes it."""
    value = SocketBindingAddress(text).address
    if isinstance(value, str):
        return UnixAddress(value)
    host, port = value
    if port is None:
        raise ValueError(f"the address {text!r} has no port")
    return TcpAddress(host or "", port)


def seconds(text: str) -> float:
    """A time that can pass."""
    value = float(text)
    if not 0 < value < 1e9:
        raise ValueError(f"{text!r} is no time in seconds")
    return value


def number(text: str) -> int:
    """How many there may be."""
    value = int(text)
    if value < 0:
        raise ValueError(f"{text!r} is negative")
    return value


def no_password(text: str) -> str:
    """The name of a function that would be asked for the password of a private key."""
    raise ValueError("a private key with a password is not read: remove it (openssl pkey), nobody is asked")


def no_directory(text: str) -> str:
    """A file of authorities: ZEO takes a directory as well."""
    if os.path.isdir(text):
        raise ValueError(f"{text} is a directory: name one file with all the certificates")
    return text


def _log_starter(path: str, eventlog: Callable[[], Any] | None) -> Callable[[], None] | None:
    if eventlog is None:
        return None

    def start() -> None:
        try:
            eventlog()
        except OSError as problem:
            why = f"can't write the log {problem.filename}: {problem.strerror}"
            raise ConfigurationError(f"{path}: {why}") from None

    return start


def _storages(path: str, sections: Sequence[Any]) -> dict[str, Callable[[], Engine]]:
    names = [section.name or "1" for section in sections]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigurationError(f"{path}: two storages are named {twice!r} (the default name is '1')")

    def opener(name: str, section: Any) -> Callable[[], Engine]:
        title = f"storage {name!r} of {path}"
        section = _unwrapped(section)
        if type(section) is FileStorage and not section.config.create:
            file, read_only = Path(section.config.path), bool(section.config.read_only)
            folder = section.config.blob_dir
            blob_dir = None if folder is None else os.path.abspath(folder)
            return lambda: open_storage(
                title, lambda: _open_section(section), file, read_only, blob_dir=blob_dir
            )
        return lambda: open_storage(title, section.open)

    return {name: opener(name, section) for name, section in zip(names, sections, strict=True)}


def _unwrapped(section: Any) -> Any:
    """For a `<blobstorage>` around a `<filestorage>`, which can keep blobs by itself, that one."""
    if type(section) is BlobStorage:
        inner = section.config.base
        if type(inner) is FileStorage and not inner.config.blob_dir:
            inner.config.blob_dir = section.config.blob_dir
            return inner
    return section


def _open_section(section: Any) -> Any:
    check_data_file(Path(section.config.path), section.config.read_only)
    return section.open()
