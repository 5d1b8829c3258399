"""A process that writes to a RelStorage directly, beside the servers of the tests, when it is told to.

Reads commands from its input, one JSON list a line, and answers each with one line. The argument is the
folder of the database, which must exist.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import ZODB
from ZODB.POSException import ConflictError

from tests.engines.relstorages import Database


def put(database: ZODB.DB, values: dict[str, Any]) -> str:
    """Set items of the root object in one transaction; its tid in hexadecimal."""
    with database.transaction() as connection:
        connection.root().update(values)
    return database.lastTransaction().hex()


def add(database: ZODB.DB, times: int) -> int:
    """Add 1 to the root's counter, that often; how often there was a conflict."""
    conflicts = 0
    while times:
        try:
            with database.transaction() as connection:
                connection.root()["counter"] += 1
            times -= 1
        except ConflictError:
            conflicts += 1
    return conflicts


def twins(database: ZODB.DB, first: int, last: int) -> str:
    """Set both twins to every number, each in one transaction."""
    for number in range(first, last):
        with database.transaction() as connection:
            connection.root()["one"].value = number
            connection.root()["other"].value = number
    return database.lastTransaction().hex()


def get(database: ZODB.DB, key: str) -> Any:
    with database.transaction() as connection:
        return connection.root()[key]


COMMANDS = {"put": put, "add": add, "twins": twins, "get": get}


def main() -> None:
    storages = Database(Path(sys.argv[1]))
    database = ZODB.DB(storages.open())
    for line in sys.stdin:
        name, *args = json.loads(line)
        print(json.dumps(COMMANDS[name](database, *args)), flush=True)
    database.close()


if __name__ == "__main__":
    main()
