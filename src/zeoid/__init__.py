"""Zeoid: share one ZODB database among many processes.

import zeoid

db = zeoid.DB(("zooserver", 7700))               # a ZODB.DB on a storage server
connection = zeoid.connection(("zooserver", 7700))  # a ZODB connection, which closes its database
storage = zeoid.ClientStorage(("zooserver", 7700))  # the storage alone

@zeoid.retry                                     # run it in a transaction, and again after a conflict
def visit(connection): ...

with zeoid.serve("Data.fs", port=7700):          # a storage server in this process
    ...
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zeoid.client.storage import ClientStorage as ClientStorage
    from zeoid.retrying import retry as retry
    from zeoid.server.embedded import RunningServer

__version__ = "0.1.0"
__all__ = ["DB", "ClientStorage", "__version__", "connection", "retry", "serve"]


def __getattr__(name: str) -> Any:
    # Importing the package must cost nothing to whoever wants only one side of it.
    if name == "ClientStorage":
        from zeoid.client.storage import ClientStorage

        return ClientStorage
    if name == "retry":
        from zeoid.retrying import retry

        return retry
    raise AttributeError(f"module 'zeoid' has no attribute {name!r}")


def DB(addr: Any, *args: Any, **keywords: Any) -> Any:
    """A `ZODB.DB` on the storage server at *addr*. All arguments are those of `ClientStorage`.

    Closing the database closes the storage.
    """
    import ZODB

    from zeoid.client.storage import ClientStorage

    storage = ClientStorage(addr, *args, **keywords)
    try:
        return ZODB.DB(storage)
    except BaseException:
        storage.close()
        raise


def connection(addr: Any, *args: Any, **keywords: Any) -> Any:
    """A ZODB connection to the storage server at *addr*; closing it closes its database, too.

    All arguments are those of `ClientStorage`.
    """
    return DB(addr, *args, **keywords).open_then_close_db_when_connection_closes()


def serve(
    storages: Any, *, host: str = "127.0.0.1", port: int = 0, path: str | None = None, **options: Any
) -> "RunningServer":
    """Run a storage server in a thread of this process, for tests and small tools.

    storages: the path of a data file, None for a storage in memory, a ZODB storage, or a mapping of names
        to these. What is given open is closed with the server.
    host, port: where to listen (port 0: any free one), unless *path* names a unix socket.
    options: those of `zeoid.server.server.StorageServer`.

    The result is a context manager with `address` and `close()`. ConfigurationError when a storage can't be
    opened or the address can't be had.
    """
    from zeoid.addresses import TcpAddress, UnixAddress
    from zeoid.server.embedded import RunningServer

    named = storages if isinstance(storages, Mapping) else {"1": storages}
    address = UnixAddress(path) if path is not None else TcpAddress(host, port)
    return RunningServer(named, address, **options)
