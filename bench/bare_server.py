"""The bare ping-pong's server: `bare_server.py REQUEST_SIZE REPLY_SIZE`. A blocking socket and nothing else.

It is the floor that a load is compared with: the least that any request and reply of these sizes can cost in
Python. One `recv` takes a whole request: it is small, and on the loopback interface it arrives in one piece.
"""

import socket
import sys


def main() -> None:
    request_size, reply = int(sys.argv[1]), bytes(int(sys.argv[2]))
    listener = socket.create_server(("127.0.0.1", 0))
    print("listening on {}:{}".format(*listener.getsockname()), flush=True)
    while True:
        connection, _ = listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while request := connection.recv(65536):
            if len(request) != request_size:
                sys.exit(f"a request came in pieces: {len(request)} of {request_size} bytes")
            connection.sendall(reply)
        connection.close()


if __name__ == "__main__":
    main()
