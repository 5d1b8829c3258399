"""Which layout a blob directory has, and the marker that says so, whatever a power cut left of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ZODB.blob import FilesystemHelper

from tests.engines.datafiles import tid
from tests.engines.journals import Quick
from zeoid.engines.blob_layout import BlobLayout, find_layout, make_layout
from zeoid.errors import ConfigurationError
from zeoid.testing.disk import FaultyDisk

eight = st.binary(min_size=8, max_size=8)


@pytest.mark.parametrize("name", ["bushy", "lawn"])
@given(oid=eight, at=eight)
def test_a_blob_is_where_zodb_looks_for_it(name: str, oid: bytes, at: bytes) -> None:
    ours, theirs = BlobLayout("/blobs", name), FilesystemHelper("/blobs", name)
    assert ours.file(oid, at) == theirs.getBlobFilename(oid, at)
    assert ours.directory(oid) == theirs.getPathForOID(oid)


@pytest.mark.parametrize(("name", "levels"), [("bushy", 9), ("lawn", 2)])
def test_the_directories_above_a_blob_end_with_the_blob_directory(name: str, levels: int) -> None:
    layout = BlobLayout("/blobs", name)
    above = layout.above(layout.directory(bytes(8)))
    assert len(above) == levels
    assert above[0] == layout.directory(bytes(8))
    assert above[-1] == "/blobs"
    assert above[1:] == [os.path.dirname(each) for each in above[:-1]]


@pytest.mark.parametrize(
    ("there", "marker", "name"),
    [
        ([], None, "bushy"),
        (["tmp"], None, "bushy"),  # ZODB died between the two
        ([".hidden", "tmp/x"], None, "bushy"),
        (["0x00/0x00"], None, "bushy"),
        (["0x00/0x00", "tmp"], "", "bushy"),
        (["0x2a/0x03.blob"], None, "lawn"),
        (["0x0123/0x03.blob", "0x2a"], "", "lawn"),
        (["something else"], None, "lawn"),
        (["0x00/0x00"], "lawn", "lawn"),
        (["0x0123"], "bushy\n", "bushy"),
        ([], "lawn", "lawn"),
    ],
)
def test_the_layout_is_what_the_marker_says_or_what_is_there(
    tmp_path: Path, there: list[str], marker: str | None, name: str
) -> None:
    root = tmp_path / "blobs"
    for path in there:
        (root / path).mkdir(parents=True)
    root.mkdir(exist_ok=True)
    if marker is not None:
        (root / ".layout").write_text(marker)
    assert find_layout(str(root), Quick()).name == name
    assert (root / ".layout").exists() == (marker is not None)
    assert make_layout(str(root), Quick()).name == name
    assert (root / ".layout").read_text().strip() == name
    assert FilesystemHelper(str(root)).layout_name == name


@pytest.mark.parametrize(("marker", "words"), [("zeocache", "a client's cache"), ("bush", "'bush'")])
def test_what_is_no_storages_blob_directory_is_refused(tmp_path: Path, marker: str, words: str) -> None:
    (tmp_path / ".layout").write_text(marker)
    for look in (find_layout, make_layout):
        with pytest.raises(ConfigurationError, match=words):
            look(str(tmp_path), Quick())
    assert (tmp_path / ".layout").read_text() == marker


def test_a_directory_is_made_where_there_is_none_but_not_those_above_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="blobs does not exist"):
        find_layout(str(tmp_path / "blobs"), Quick())
    with pytest.raises(ConfigurationError, match="make it first"):
        make_layout(str(tmp_path / "nosuch" / "blobs"), Quick())
    assert make_layout(str(tmp_path / "blobs"), Quick()).name == "bushy"


@pytest.mark.parametrize("there", [[], ["blobs"], ["blobs", "blobs/tmp"], ["blobs", "blobs/0x01"]])
def test_whatever_a_power_cut_leaves_of_a_new_marker_the_layout_is_the_same(
    tmp_path: Path, there: list[str]
) -> None:
    root = tmp_path / "root"
    for folder in ["", *there]:
        (root / folder).mkdir()
    wanted = "lawn" if "blobs/0x01" in there else "bushy"

    class Stop(BaseException):
        pass

    for stop_at in range(30):
        copy = tmp_path / f"{stop_at}"
        for folder in ["", *there]:
            (copy / folder).mkdir()
        disk = FaultyDisk(copy)

        def begins(name: str, path: str, disk: FaultyDisk = disk, stop_at: int = stop_at) -> None:
            if disk.operations >= stop_at:
                raise Stop

        disk.on_operation = begins
        try:
            make_layout(str(copy / "blobs"), disk)
        except Stop:
            done = False
        else:
            done = True
        for state in disk.crash_states(20, stop_at):
            marker = state / "blobs" / ".layout"
            assert not marker.exists() or marker.read_text() == wanted
            assert marker.exists() or not done
            assert make_layout(str(state / "blobs"), Quick()).name == wanted
        if done:
            assert stop_at >= 5
            return
    pytest.fail("it did not come to its end")


def test_names_of_revisions(tmp_path: Path) -> None:
    assert BlobLayout("/b", "bushy").file(bytes(7) + b"*", tid(1)) == (
        "/b/0x00/0x00/0x00/0x00/0x00/0x00/0x00/0x2a/0x03c0000001000000.blob"
    )
    assert BlobLayout("/b", "lawn").file(bytes(7) + b"*", tid(1)) == "/b/0x2a/0x03c0000001000000.blob"
