"""The demo, run as `make demo` runs it: what it proves, and that nothing of it stays behind.

Needs the environment with Zope that `make` installs, or one named by ZOPE_VENV.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 90.0
UP = "Ctrl-C ends everything and removes it."


@contextmanager
def demo(temporary: Path, zope_venv: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A demo whose folder, which is in the command line of each of its processes, lies in `temporary`."""
    command = [sys.executable, "-m", "demo", "--zope-venv", str(zope_venv), *options]
    environment = {**os.environ, "TMPDIR": str(temporary)}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        deadline = threading.Timer(TIMEOUT_S, process.kill)  # ends every wait for its output, too
        deadline.start()
        try:
            yield process
        finally:
            deadline.cancel()
            process.kill()  # nothing happens when it has ended; its guard does the rest


def output_until_end(process: subprocess.Popen[str]) -> str:
    """What the demo and its guard, which writes to the same pipe, say until both have ended."""
    return process.communicate(timeout=TIMEOUT_S + 10)[0]


def output_until_up(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(UP):
            return "".join(lines)
    return pytest.fail("The demo ended before it was up:\n" + "".join(lines))


def processes_of(temporary: Path) -> list[str]:
    """The command lines that name this folder."""
    found = []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
        if str(temporary) in command:
            found.append(command)
    return found


def assert_nothing_left(temporary: Path) -> None:
    assert processes_of(temporary) == []
    assert list(temporary.iterdir()) == []


def test_check_shows_that_each_zope_sees_what_the_others_write(tmp_path: Path, zope_venv: Path) -> None:
    with demo(tmp_path, zope_venv, "--check") as process:
        output = output_until_end(process)
    assert process.returncode == 0, output
    for wrote, others in (
        ('Zope 1 created /greeting: "Hello from Zope 1."', ("Zope 2", "Zope 3")),
        ('Zope 2 changed /greeting: "Hello from Zope 2."', ("Zope 1", "Zope 3")),
        ('Zope 3 changed /greeting: "Hello from Zope 3."', ("Zope 1", "Zope 2")),
    ):
        (line,) = (line for line in output.splitlines() if wrote in line)
        seen = line.partition("Seen by")[2]
        assert all(f"{other} after " in seen for other in others), output
    assert output.endswith("The three Zopes agree.\n")
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_stays_up_until_a_signal_and_leaves_nothing(
    tmp_path: Path, zope_venv: Path, number: signal.Signals
) -> None:
    with demo(tmp_path, zope_venv) as process:
        output = output_until_up(process)
        # The server, three Zopes, the guard and its group's first member.
        assert len(processes_of(tmp_path)) == 6, output
        process.send_signal(number)
        assert "Stopping." in output_until_end(process)
    assert process.returncode == 0
    assert_nothing_left(tmp_path)


def test_nothing_is_left_when_the_demo_is_killed_hard(tmp_path: Path, zope_venv: Path) -> None:
    with demo(tmp_path, zope_venv) as process:
        output_until_up(process)
        process.kill()
        output_until_end(process)
    assert process.returncode == -signal.SIGKILL
    assert_nothing_left(tmp_path)


def test_two_at_once_do_not_disturb_each_other(tmp_path: Path, zope_venv: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    with demo(folders[0], zope_venv, "--check") as one, demo(folders[1], zope_venv, "--check") as two:
        outputs = [output_until_end(process) for process in (one, two)]
    assert (one.returncode, two.returncode) == (0, 0), "\n".join(outputs)
    for folder in folders:
        assert_nothing_left(folder)


def test_a_server_that_does_not_start_is_explained(
    tmp_path: Path, zope_venv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package that stands in for zeoid ends at once: the demo shows the end of its log."""
    package = tmp_path / "packages" / "zeoid"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text("import sys; sys.exit('no port for you')\n")
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    with demo(temporary, zope_venv, "--check") as process:
        output = output_until_end(process)
    assert process.returncode == 1
    assert "Storage server ended with exit status 1." in output
    assert "| no port for you" in output
    assert_nothing_left(temporary)


def test_without_zope_it_says_how_to_get_it(tmp_path: Path) -> None:
    with demo(tmp_path, tmp_path, "--check") as process:
        output = output_until_end(process)
    assert process.returncode == 1
    assert f"There is no Zope in {tmp_path}." in output
    assert "make demo" in output
