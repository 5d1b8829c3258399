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


def tid_of(changed: Any) -> str:
    """The tid that an object was committed at. A storage that only makes instances tells an old one."""
    tid: bytes = changed._p_serial
    return tid.hex()


def put(database: ZODB.DB, values: dict[str, Any]) -> str:
    """Set items of the root object in one transaction; its tid in hexadecimal."""
    with database.transaction() as connection:
        root = connection.root()
        root.update(values)
    return tid_of(root)


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
    """Set both twins to every number, each in one transaction; the last one's tid in hexadecimal."""
    for number in range(first, last):
        with database.transaction() as connection:
            one, other = connection.root()["one"], connection.root()["other"]
            one.value = other.value = number
    return tid_of(one)


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
