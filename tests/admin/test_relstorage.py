"""Copying to RelStorage and back, on SQLite: with its history, and where it keeps none."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest

from tests.admin.databases import Site, contents_of_file, write_history
from zeoid.cli import main


def uri(folder: Path, *, keep_history: bool) -> str:
    kept = str(keep_history).lower()
    return f"sqlite://?data_dir={folder}/sql&blob_dir={folder}/sql-blobs&keep_history={kept}"


@pytest.fixture
def site(tmp_path: Path) -> Site:
    site = Site(tmp_path)
    write_history(site)
    site.close()
    return site


def copy(*arguments: object) -> int:
    return main(["copy", *map(str, arguments)])


def test_there_and_back(site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sql = uri(tmp_path, keep_history=True)
    assert copy(site.path, sql, "--source-blobs", site.blobs) == 0
    back = tmp_path / "back.fs"
    assert copy(sql, back, "--destination-blobs", tmp_path / "back-blobs") == 0
    expected = contents_of_file(site.path, site.blobs)
    assert contents_of_file(back, tmp_path / "back-blobs") == expected
    assert capsys.readouterr().out.count(f"verified: {len(expected)} transactions are equal in both\n") == 2
    # A second run finds nothing to do.
    assert copy(site.path, sql, "--source-blobs", site.blobs) == 0
    assert "nothing to copy" in capsys.readouterr().out


def test_by_a_configuration_file(site: Site, tmp_path: Path) -> None:
    (tmp_path / "sql.conf").write_text(
        f"""
        %import relstorage
        <relstorage>
          keep-history true
          blob-dir {tmp_path}/sql-blobs
          <sqlite3>
            data-dir {tmp_path}/sql
          </sqlite3>
        </relstorage>
        """
    )
    assert copy(site.path, tmp_path / "sql.conf", "--source-blobs", site.blobs) == 0
    back = tmp_path / "back.fs"
    assert copy(tmp_path / "sql.conf", back, "--destination-blobs", tmp_path / "back-blobs") == 0
    assert contents_of_file(back, tmp_path / "back-blobs") == contents_of_file(site.path, site.blobs)


def test_what_comes_later_is_copied_by_a_second_run(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sql = uri(tmp_path, keep_history=True)
    assert copy(site.path, sql, "--source-blobs", site.blobs) == 0
    again = Site(tmp_path)
    again.commit(more=again.blob(b"more"))
    again.close()
    capsys.readouterr()
    assert copy(site.path, sql, "--source-blobs", site.blobs) == 0
    assert capsys.readouterr().out.startswith("copied 1 transactions, 2 records, 1 blobs")


def test_without_history(site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sql = uri(tmp_path, keep_history=False)
    for said in ("copied", "nothing to copy"):
        assert copy(site.path, sql, "--source-blobs", site.blobs) == 0
        told = capsys.readouterr().out
        assert told.startswith(said)
        assert "\nverified: the newest revision of each object is equal in both; " in told
    back, blobs = tmp_path / "back.fs", tmp_path / "back-blobs"
    assert copy(sql, back, "--destination-blobs", blobs) == 0
    newest = newest_records(site.path, site.blobs)
    assert newest_records(back, blobs) == {oid: data for oid, data in newest.items() if data[0] is not None}


def newest_records(path: Path, blobs: Path) -> dict[str, Any]:
    return {oid: data for *_, records in contents_of_file(path, blobs) for oid, data in records.items()}


def test_a_newest_revision_that_got_lost_is_found(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sql = uri(tmp_path, keep_history=False)
    assert copy(site.path, sql, "--source-blobs", site.blobs) == 0
    (database,) = (tmp_path / "sql").glob("main.sqlite3")
    with sqlite3.connect(database) as connection:
        connection.execute("DELETE FROM object_state WHERE zoid = 5")
    connection.close()
    assert copy(site.path, sql, "--source-blobs", site.blobs) == 1
    assert "object 0000000000000005 is missing in the destination" in capsys.readouterr().err
