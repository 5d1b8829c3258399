"""What stock ZODB finds in the data files after a run, and whether the files themselves are sound.

Reads with the stock FileStorage and ZODB's own checkers; nothing of Zeoid takes part.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ZODB
from BTrees.check import check as check_tree
from ZODB.broken import Broken
from ZODB.FileStorage import FileStorage
from ZODB.scripts import fstest

from tests.torture.checker import Found
from tests.torture.objects import POPULATING, STORAGES, blob_dir, data_file


def read(folder: Path) -> tuple[dict[str, Found], list[str]]:
    """What is in each storage, and what is wrong with the files and the objects in them."""
    problems: list[str] = []
    found: dict[str, Found] = {}
    for storage in STORAGES:
        path = data_file(folder, storage)
        try:
            fstest.check(str(path))
            problems += [f"storage {storage}: {problem}" for problem in _index_problems(path)]
            blobs = blob_dir(folder, storage)
            found[storage], objects = _read(path, blobs)
            problems += [f"storage {storage}: {problem}" for problem in (*objects, *_left_blobs(blobs))]
        except Exception as problem:  # whatever stock ZODB makes of a broken file
            problems.append(f"storage {storage}: {type(problem).__name__}: {problem}")
    return found, problems


def _index_problems(path: Path) -> list[str]:
    """The index that the server left must be the one that a scan of the file makes."""
    left = _index(path)
    Path(f"{path}.index").unlink(missing_ok=True)
    return [] if left == _index(path) else ["the index that the server left is not that of the file"]


def _index(path: Path) -> dict[bytes, int]:
    storage = FileStorage(str(path), read_only=True)
    try:
        return dict(storage._index.items())
    finally:
        storage.close()


def _left_blobs(blobs: Path) -> list[str]:
    """Files that belong to nothing."""
    left = [each.name for folder in (".staged", "tmp") for each in (blobs / folder).glob("*")]
    return [f"files of blobs are left: {left}"] if left else []


def _read(path: Path, blobs: Path) -> tuple[Found, list[str]]:
    storage = FileStorage(str(path), read_only=True, blob_dir=str(blobs))
    descriptions = (each.description.decode() for each in storage.iterator())
    ids = [description for description in descriptions if description not in POPULATING]
    database = ZODB.DB(storage)
    try:
        connection = database.open()
        root: Any = connection.root()
        problems = _loading_problems(connection)
        problems += _tree_problems(root["entries"])
        counters = {name: counter.value for name, counter in root["counters"].items()}
        keys = []
        for key, entry in root["entries"].items():
            keys.append(key)
            if entry.key != key or not entry.sound:
                problems.append(f"the entry of key {key} has another's data or blob, or none")
            entry._p_deactivate()
        connection.close()
    finally:
        database.close()
    return Found(counters, keys, ids), problems


def _tree_problems(tree: Any) -> list[str]:
    """A tree may be broken and still be read."""
    try:
        check_tree(tree)
        tree._check()
    except AssertionError as problem:
        return [f"the tree is broken: {problem}"]
    return []


def _loading_problems(connection: Any) -> list[str]:
    """Every record must be loadable, whether something refers to it or not."""
    problems: list[str] = []
    after = None
    while True:
        oid, _, _, after = connection.db().storage.record_iternext(after)
        try:
            loaded = connection.get(oid)
            loaded._p_activate()
            if isinstance(loaded, Broken):
                problems.append(f"object {oid.hex()}: its class is not there")
            loaded._p_deactivate()
        except Exception as problem:  # whatever unpickling raises
            problems.append(f"object {oid.hex()}: {type(problem).__name__}: {problem}")
        if after is None:
            return problems
