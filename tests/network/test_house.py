"""The house itself: its computers are apart, and nothing of it stays."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.network import guard, house
from tests.network.house import House
from tests.peers import wait_until


@pytest.fixture(autouse=True)
def _needed() -> None:
    if reason := house.missing():
        pytest.skip(reason)


def left(one: House) -> list[str]:
    """What there still is of a house."""
    prefix = one.namespace("")
    found = [*guard.NAMESPACES.glob(f"{prefix}*"), *guard.ETC.glob(f"{prefix}*")]
    folders = [one.folder] if one.folder.exists() else []
    return [str(each) for each in (*found, *folders)]


def test_computers_reach_each_other_by_name_and_nothing_else() -> None:
    with House("a", "b") as one:
        server = one.start("a", "python", "-u", "-m", "http.server", "--bind", "a", "8000")
        one.wait_for(server, "Serving HTTP on 192.0.2.10 ")
        (one.disk("a") / "page").write_text("of a")
        fetch = "from urllib.request import urlopen; print(urlopen('http://a:8000/page').read().decode())"
        assert one.run("b", "python", "-c", fetch).stdout == "of a\n"
        with one.here("b"), socket.create_connection((one.addresses["a"], 8000), 10):
            pass
        with pytest.raises(OSError, match=r"."), socket.create_connection((one.addresses["a"], 8000), 0.2):
            pass
        assert "unreachable" in one.run("a", "ip", "route", "get", "198.51.100.1").stderr


def test_each_has_a_disk_of_its_own() -> None:
    before = sorted(os.listdir(house.DISK))
    with House("a", "b") as one:
        assert one.run("a", "sh", "-c", "echo hello > file && pwd").stdout == f"{house.DISK}\n"
        assert (one.disk("a") / "file").read_text() == "hello\n"
        assert one.run("b", "ls", str(house.DISK)).stdout == ""
        assert sorted(os.listdir(house.DISK)) == before


def is_alive(process: int) -> bool:
    """Whether it runs: one that is dead, and waits for somebody to ask how it ended, has no command line."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes() != b""
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_nothing_stays_after_a_failure() -> None:
    one = House("a", "b")
    running: list[int] = []

    def fail() -> None:
        with one:
            process = one.start("a", "sh", "-c", "trap '' TERM HUP; sleep 1000 & echo up; wait")
            one.wait_for(process, "up")
            assert left(one)
            running.extend(guard.processes(one.namespace("a")))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert left(one) == []
    assert len(running) == 2, "a shell, and its own process"
    assert not [each for each in running if is_alive(each)]


def test_nothing_stays_when_the_tests_are_killed(tmp_path: Path) -> None:
    script = (
        "import time; from tests.network.house import House; one = House('a'); one.__enter__();"
        "one.wait_for(one.start('a', 'sh', '-c', 'echo up; sleep 1000'), 'up');"
        "print(one.namespace(''), flush=True); time.sleep(1000)"
    )
    command = [sys.executable, "-c", script]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(tmp_path)},
        cwd=Path(__file__).parents[2],
    ) as tests:  # fmt: skip
        try:
            assert tests.stdout is not None
            prefix = tests.stdout.readline().strip()
            assert guard.processes(f"{prefix}a")
        finally:
            tests.kill()
    wait_until(lambda: os.listdir(tmp_path) == [], "the guard removes the house's folder", 30.0)
    assert not list(guard.NAMESPACES.glob(f"{prefix}*"))
    assert not list(guard.ETC.glob(f"{prefix}*"))


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert house.missing() == ""
    assert house.missing("no-such-command").startswith("not installed: no-such-command ")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert house.missing() == "network namespaces need root"
