"""Run ZEO's own storage server, unmodified, and print the address it got.

Owns one line of output: `runzeo` logs the address it was asked for, so a server on port 0 never tells its
port. Must not change anything else about the server.
"""

from ZEO.runzeo import ZEOOptions, ZEOServer


class AnnouncedServer(ZEOServer):
    def create_server(self) -> None:
        super().create_server()
        address = self.server.acceptor.addr
        print(
            "listening on", address if isinstance(address, str) else "{}:{}".format(*address[:2]), flush=True
        )


if __name__ == "__main__":
    options = ZEOOptions()
    options.realize()
    AnnouncedServer(options).main()
