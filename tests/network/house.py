"""Several computers on one: network namespaces that a bridge connects.

Each has a name that all of them know, an address, and a disk of its own: the folder /srv, where its commands
run. Everything else of the file system they have in common. Needs root and `ip`; `guard` removes all of it.
Must not know what runs on the computers.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from demo.processes import DemoError, Process

from tests.network import guard
from tests.peers import environment

#: A network for documentation: the guide's addresses are the ones that are used here.
NET = "192.0.2"
FIRST_NUMBER = 10
DISK = Path("/srv")
RUN_S = 60.0
START_S = 60.0
GUARD_S = 60.0

#: `ip netns exec` gives a command its own view of what is mounted, so this is seen by nobody else.
_MOUNT = 'mount --bind "$0" /srv && cd /srv && exec "$@"'


def missing(*commands: str) -> str:
    """What is not here that is needed, besides these commands: a skip's reason; empty if nothing."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    gone = [] if shutil.which("ip") else ["ip"]
    gone += [each for each in commands if shutil.which(each, path=_path()) is None]
    if gone:
        return f"not installed: {', '.join(gone)} (of iproute2, openssh-server, stunnel4, nftables)"
    used = (Path(__file__), Path(sys.executable), Path(sys.prefix))
    if not DISK.is_dir() or any(each.resolve().is_relative_to(DISK) for each in used):
        return f"{DISK} must be there, and neither this project nor Python in it"
    try:
        with House("trial") as trial:
            done = trial.run("trial", "true")
    except OSError as problem:
        return f"network namespaces can't be made here: {problem}"
    return f"network namespaces can't be used here: {done.stderr.strip()}" if done.returncode else ""


def _path() -> str:
    """Where commands are: first those beside Python, last those that only root uses."""
    beside_python = str(Path(sys.executable).parent)
    return os.pathsep.join([beside_python, os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


class House:
    """A network with some computers, by name. Nothing outside can be reached from it, nor it from outside."""

    def __init__(self, *names: str) -> None:
        self._prefix = f"zeoid-{secrets.token_hex(3)}-"
        self.addresses = {name: f"{NET}.{number}" for number, name in enumerate(names, FIRST_NUMBER)}
        self.folder = Path(tempfile.gettempdir()).resolve() / f"{self._prefix}house"
        self.processes: list[Process] = []
        self._guard: subprocess.Popen[str] | None = None

    def __enter__(self) -> House:
        self.folder.mkdir(mode=0o700)
        self._guard = subprocess.Popen(
            [sys.executable, "-I", guard.__file__, self._prefix, str(self.folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            assert self._guard.stdout is not None
            assert self._guard.stdout.readline() == "here\n", "the guard did not start"
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End everything on the computers, and remove them."""
        assert self._guard is not None
        self._guard.communicate(timeout=GUARD_S)
        for process in self.processes:
            process.wait()

    def _build(self) -> None:
        hall = self.namespace("hall")
        _ip("netns", "add", hall)
        _ip("-n", hall, "link", "add", "bridge", "type", "bridge")
        _ip("-n", hall, "link", "set", "bridge", "up")
        hosts = "".join(f"{address} {name}\n" for name, address in self.addresses.items())
        for number, (name, address) in enumerate(self.addresses.items()):
            namespace = self.namespace(name)
            _ip("netns", "add", namespace)
            self.disk(name).mkdir(mode=0o755)
            # `ip netns exec` shows what is in this folder in the place of what is in /etc.
            self.etc(name).mkdir(parents=True)
            (self.etc(name) / "hosts").write_text(f"127.0.0.1 localhost\n{hosts}")
            plug = f"plug{number}"
            _ip("-n", namespace, "link", "add", "eth0", "type", "veth", "peer", "name", plug, "netns", hall)
            _ip("-n", hall, "link", "set", plug, "master", "bridge", "up")
            _ip("-n", namespace, "address", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", namespace, "link", "set", device, "up")

    def namespace(self, name: str) -> str:
        return self._prefix + name

    def disk(self, name: str) -> Path:
        """A computer's /srv, as the tests see it."""
        return self.folder / name

    def etc(self, name: str) -> Path:
        """What a computer sees of these in /etc: files and folders that are there for all."""
        return guard.ETC / self.namespace(name)

    def on(self, name: str, command: Sequence[str]) -> list[str]:
        """*command*, as it is to be given to have it run on a computer."""
        entering = ["ip", "netns", "exec", self.namespace(name), "sh", "-c", _MOUNT, str(self.disk(name))]
        return [*entering, *command]

    def environment(self) -> dict[str, str]:
        """That of commands: as if Zeoid was installed there, with nothing else that the tests were given."""
        kept = {key: os.environ[key] for key in ("LANG", "LC_ALL") if key in os.environ}
        pythonpath = environment()["PYTHONPATH"]
        return {**kept, "PATH": _path(), "HOME": str(DISK), "TMPDIR": str(DISK), "PYTHONPATH": pythonpath}

    def run(self, name: str, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command there to its end."""
        return subprocess.run(
            self.on(name, command), check=False, timeout=RUN_S, env=self.environment(),
            stdin=subprocess.DEVNULL, capture_output=True, text=True,
        )  # fmt: skip

    def start(self, name: str, *command: str, environment: Mapping[str, str] | None = None) -> Process:
        """Start a command there; it is killed in the end, if it is still there."""
        log = self.folder / f"{len(self.processes)}.log"
        environment = self.environment() if environment is None else environment
        process = Process(f"{name}: {' '.join(command)}", self.on(name, command), log, 0, environment)
        self.processes.append(process)
        return process

    def wait_for(self, process: Process, pattern: str) -> str:
        """Wait until it has said so, and return that. AssertionError, with what it did say."""
        try:
            found = process.wait_for_line(pattern, START_S)
        except DemoError as problem:
            raise AssertionError(f"{problem}\n{process.tail()}") from None
        return found[0]

    @contextlib.contextmanager
    def here(self, name: str) -> Iterator[None]:
        """This thread is on that computer meanwhile: sockets that it opens belong there."""
        libc = ctypes.CDLL(None, use_errno=True)
        own = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        there = os.open(guard.NAMESPACES / self.namespace(name), os.O_RDONLY)
        try:
            _check(libc.setns(there, 0))
            try:
                yield
            finally:
                _check(libc.setns(own, 0))
        finally:
            os.close(own)
            os.close(there)


def _check(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), "setns")


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
