"""A kind of client, a kind of server and the coding between them: what every test here runs with."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import ZODB
from transaction import TransactionManager

from tests.peers import CODINGS, KINDS, UNCLOSED_BUFFER, Address, Coding, Kind, Peers, Server, wait_until


@dataclass(frozen=True)
class Pair:
    """Servers of one kind and clients of one kind; the server offers the coding, and the client wants it."""

    client_kind: Kind
    server_kind: Kind
    coding: Coding
    peers: Peers

    def server(self, **options: Any) -> Server:
        return self.peers.server(self.server_kind, coding=self.coding, **options)

    def client(self, address: Address | Sequence[Address], **options: Any) -> Any:
        return self.peers.client(self.client_kind, address, coding=self.coding, **options)

    def database(self, address: Address | Sequence[Address], **options: Any) -> ZODB.DB:
        return self.peers.database(self.client_kind, address, coding=self.coding, **options)


class Session:
    """A connection with a transaction manager of its own, as each thread of an application has one."""

    def __init__(self, database: ZODB.DB) -> None:
        self.database = database
        self.manager = TransactionManager()
        self.connection = database.open(self.manager)
        self.begin = self.manager.begin
        self.commit = self.manager.commit
        self.abort = self.manager.abort

    @property
    def root(self) -> Any:
        return self.connection.root()

    def wait_to_see(self, condition: Callable[[], bool], what: str) -> None:
        """Begin transactions until one of them sees what another client did."""

        def sees() -> bool:
            self.begin()
            return condition()

        wait_until(sees, what)


def every_pair() -> list[Any]:
    return [
        pytest.param(
            (client, server, coding),
            id=f"{client}-{server}-{coding}",
            marks=list(marks(client, server)),
        )
        for client, server, coding in itertools.product(KINDS, KINDS, CODINGS)
    ]


def marks(client: Kind, server: Kind) -> Iterator[pytest.MarkDecorator]:
    if client == "stock":
        yield pytest.mark.filterwarnings(f"ignore:{UNCLOSED_BUFFER}:ResourceWarning")
    if client == server == "stock":
        # It only shows that the tests ask for nothing that ZEO doesn't do.
        yield pytest.mark.every_combination


@pytest.fixture(params=every_pair())
def pair(request: pytest.FixtureRequest, peers: Peers) -> Pair:
    """The names of the tests end in the client's kind, the server's kind and the coding."""
    client, server, coding = request.param
    pair = Pair(client, server, coding, peers)
    known = request.node.get_closest_marker("stock_server_fails")
    if known and pair.server_kind == "stock":
        request.applymarker(pytest.mark.xfail(reason=f"stock server: {known.args[0]}", strict=True))
    return pair
