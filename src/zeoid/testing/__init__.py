"""What tests need, Zeoid's and yours: a storage server that does exactly what the test says.

`ScriptedServer` accepts connections and speaks the protocol, but nothing happens by itself: the test decides
which bytes are sent, in which order and in how many segments, and reads the client's calls one by one. So
what a network does once in a million times, a test does every time:

    from zeoid.testing import ScriptedServer

    with ScriptedServer() as server:
        storage = zeoid.ClientStorage(server.address, wait=False)
        connection = server.accept()
        connection.welcome(tid)                       # everything up to a connection that is ready
        loading = in_a_thread(storage.load, oid)      # the client waits for the script …
        load = connection.expect("loadBefore")        # … and the script for the client, with a deadline
        connection.send(                              # one segment
            connection.invalidation(later_tid, [oid]),
            connection.reply(load, (b"data", tid, None)),
        )

To test an application against a real server, use `zeoid.serve(None)`, which keeps its data in memory.

`DelayingProxy` stands between a client and a server and makes the way between them longer.

`FaultyDisk` is a disk for tests of what writes files: it knows what was synced, and makes the directories
that a power cut could leave.
"""

from zeoid.testing.delaying import DelayingProxy
from zeoid.testing.disk import FaultyDisk
from zeoid.testing.scripted import INFO, Call, ScriptedConnection, ScriptedServer

__all__ = ["INFO", "Call", "DelayingProxy", "FaultyDisk", "ScriptedConnection", "ScriptedServer"]
