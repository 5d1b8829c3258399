"""The bare ping-pong's server: `bare_server.py REQUEST_SIZE REPLY_SIZE [BUNDLE]`. A blocking socket and
nothing else but TLS, with the certificates of a bundle if there is one.

It is the floor that a load is compared with: the least that any request and reply of these sizes can cost in
Python. One `recv` takes a whole request: it is small, and on the loopback interface it arrives in one piece.
"""

import socket
import ssl
import sys


def main() -> None:
    request_size, reply = int(sys.argv[1]), bytes(int(sys.argv[2]))
    context = None
    if len(sys.argv) > 3:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(sys.argv[3])
        context.load_verify_locations(sys.argv[3])
        context.verify_mode = ssl.CERT_REQUIRED
    listener = socket.create_server(("127.0.0.1", 0))
    print("listening on {}:{}".format(*listener.getsockname()), flush=True)
    while True:
        connection, _ = listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if context is not None:
            connection = context.wrap_socket(connection, server_side=True)
        while request := connection.recv(65536):
            if len(request) != request_size:
                sys.exit(f"a request came in pieces: {len(request)} of {request_size} bytes")
            connection.sendall(reply)
        connection.close()


if __name__ == "__main__":
    main()
