"""The lean server: `lean_server.py DATA_FS`. Answers loads over the real messages, and does nothing else.

What the bare socket leaves out and no storage server in Python can: an event loop, msgpack, the index and the
file. What it leaves out itself is what makes a storage server of it: it checks nothing, serves nothing but
`loadBefore`, has no other clients to think of, and falls over at the first surprise.
"""

import asyncio
import os
import socket
import sys

import msgpack
import uvloop
from ZODB.FileStorage import FileStorage

HEADER_BYTES = 42
READ_BYTES = 2048


def main() -> None:
    storage = FileStorage(sys.argv[1], read_only=True)
    file, index = storage._file.fileno(), storage._index
    pack, unpack = msgpack.Packer().pack, msgpack.unpackb

    class Connection(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = transport
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def data_received(self, data: bytes) -> None:
            message_id, _, _, (oid, _) = unpack(data[4:], use_list=False)
            record = os.pread(file, READ_BYTES, index[oid])
            size = int.from_bytes(record[34:HEADER_BYTES], "big")
            revision = record[HEADER_BYTES : HEADER_BYTES + size], record[8:16], None
            message = pack((message_id, 0, ".reply", revision))
            self.transport.write(len(message).to_bytes(4, "big") + message)

    async def serve() -> None:
        server = await asyncio.get_running_loop().create_server(Connection, "127.0.0.1", 0)
        print("listening on {}:{}".format(*server.sockets[0].getsockname()), flush=True)
        await server.serve_forever()

    uvloop.run(serve())


if __name__ == "__main__":
    main()
