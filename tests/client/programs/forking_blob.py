"""A process forks while a thread of it downloads a blob; its child loads another blob, then the same one."""

from __future__ import annotations

import os
import sys
import threading
import warnings

from zeoid import ClientStorage

OID, OTHER = ((42).to_bytes(8, "big"), (43).to_bytes(8, "big"))


def say(text: str) -> None:
    sys.stdout.write(text + "\n")  # in one piece: threads say something at the same time
    sys.stdout.flush()


def main(address: str, cache: str) -> None:
    storage = ClientStorage(address, blob_dir=cache, wait_timeout=20)
    tid = storage.lastTransaction()

    def load(who: str, oid: bytes) -> None:
        with storage.openCommittedBlobFile(oid, tid) as file:
            say(f"{who} has {file.read()!r}")

    thread = threading.Thread(target=load, args=("parent", OID))
    thread.start()
    sys.stdin.readline()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork with threads is what this is about
        child = os.fork()
    if child == 0:
        try:
            load("child", OTHER)
            load("child", OID)
            storage.close()
        except BaseException as problem:
            say(f"child: {problem!r}")
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    say(f"child ended with {os.waitstatus_to_exitcode(status)}")
    thread.join()
    storage.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
