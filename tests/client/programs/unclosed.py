"""A process that opens a storage, in one of several ways, and simply ends: it never closes it."""

from __future__ import annotations

import sys
import threading

import zeoid


def main(how: str, address: str) -> None:
    if how == "connected":
        storage = zeoid.ClientStorage(address)
        storage.ping()
    elif how == "database":
        database = zeoid.DB(address)
        connection = database.open()
        connection.root()
    elif how == "read-only fallback":
        storage = zeoid.ClientStorage(address, read_only_fallback=True)
    elif how == "not connected":
        storage = zeoid.ClientStorage(address, wait=False)
    elif how == "call under way":
        storage = zeoid.ClientStorage(address)
        threading.Thread(target=storage.loadSerial, args=(b"\0" * 8, b"\0" * 8), daemon=True).start()
        sys.stdin.readline()  # the server has the call
    print("done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
