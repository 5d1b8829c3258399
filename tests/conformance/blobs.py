"""ZODB's own tests of blob storages, as a program: `… -m tests.conformance.blobs zeoid stock cache bushy`.

Owns how a test of theirs gets a storage: all share one server, on which each has a storage of its own, with
its blob directory. In `shared` mode the server's directory leads to the one that the test names. Prints what
was run. A program, because they change what belongs to the process, and must not run with a superuser's
rights.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
import unittest
from pathlib import Path
from typing import Any

import ZODB.tests.testblob

from tests.peers import CODINGS, Coding, Kind, Layout, Peers

TESTS = 20
#: More where blobs can be copied into a client's storage: ZEO's protocol has no way to.
RECOVERY_TESTS = 1
STORAGES = 40


class Stage:
    """Makes the storages of the tests."""

    def __init__(self, peers: Peers, client: Kind, server: Kind, shared: bool, layout: Layout) -> None:
        names = [str(number) for number in range(1, STORAGES + 1)]
        self._coding: Coding = CODINGS[shared]
        self._peers = peers
        self._client = client
        self._server = peers.server(server, coding=self._coding, storages=names, blobs=layout)
        self._shared = shared
        self._names = iter(names)
        self.made = 0

    def storage(self, _: str, blob_dir: str) -> Any:
        name = next(self._names)
        self.made += 1
        if self._shared:
            # The test goes on to remove it. The server knows it by its path only.
            shutil.move(self._server.blob_dir(name), blob_dir)
            self._server.blob_dir(name, exists=False).symlink_to(os.path.abspath(blob_dir))
        return self._peers.client(
            self._client,
            self._server.address,
            storage=name,
            coding=self._coding,
            blob_dir=blob_dir,
            shared_blob_dir=self._shared,
        )


def main(client: Kind, server: Kind, mode: str, layout: Layout) -> int:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        peers = stack.enter_context(Peers(folder))
        stage = Stage(peers, client, server, mode == "shared", layout)
        recovery = client == server == "zeoid"
        suite = ZODB.tests.testblob.storage_reusable_suite(
            "Zeoid", stage.storage, test_blob_storage_recovery=recovery
        )
        result = unittest.TextTestRunner(verbosity=2).run(suite)
        bad = len(result.failures) + len(result.errors)
        print(f"ran {result.testsRun}, skipped {len(result.skipped)}, failed {bad}, storages {stage.made}")
        return 0 if result.wasSuccessful() else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))  # type: ignore[arg-type]
