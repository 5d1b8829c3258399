"""A process that loads a blob, whose content it prints, with a cache that another process may be filling."""

from __future__ import annotations

import sys

from zeoid import ClientStorage

OID = (42).to_bytes(8, "big")


def main(address: str, cache: str) -> None:
    storage = ClientStorage(address, blob_dir=cache, wait_timeout=20)
    sys.stdout.write("loading\n")
    sys.stdout.flush()
    with storage.openCommittedBlobFile(OID, storage.lastTransaction()) as file:
        sys.stdout.write(f"{file.read()!r}\n")
    storage.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
