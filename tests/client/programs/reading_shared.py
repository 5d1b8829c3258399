"""A process with a shared object cache that reads a range of objects whenever it is told to.

Each line of input is "FIRST LAST"; each is answered with a line: what the objects' data were (all the same,
or "different"), and how many loads the server has answered so far. It ends with its input.
"""

from __future__ import annotations

import sys

import zeoid
from zeoid.model import tid_after


def main(address: str, cache_dir: str) -> None:
    storage = zeoid.ClientStorage(address, cache_dir=cache_dir)
    print("ready", flush=True)
    for line in sys.stdin:
        first, last = map(int, line.split())
        storage.sync()
        before = tid_after(storage.lastTransaction())
        oids = [number.to_bytes(8, "big") for number in range(first, last + 1)]
        found = {storage.loadBefore(oid, before)[0] for oid in oids}
        # What was loaded is in the cache when the storage is closed, and soon after it was loaded.
        while storage.cache_statistics()["waiting"]:
            pass
        data = found.pop() if len(found) == 1 else b"different"
        print(data[:20].decode(), storage.server_status()["loads"], flush=True)
    storage.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
