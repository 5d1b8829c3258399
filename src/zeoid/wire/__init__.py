"""ZEO's protocol as pure functions and state: bytes in, messages out, and back.

Nothing below this package knows a socket, a thread, a clock or a log; the server and the client run the
same core. `docs/protocol.md` describes the protocol.
"""
