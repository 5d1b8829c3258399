"""Several computers on one: network namespaces that a bridge connects, each with a name and an address.

Needs root and `ip`; everything that was made is removed in the end. Must not know what runs on the computers.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

_NET = "10.87.65"


def missing() -> str:
    """What is not here that is needed, for a skip's reason; empty if nothing."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "the command `ip` (iproute2) is not installed"
    trial = f"zeoid-{secrets.token_hex(3)}"
    made = subprocess.run(["ip", "netns", "add", trial], check=False, capture_output=True, text=True)
    if made.returncode != 0:
        return f"network namespaces can't be made: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", trial], check=True)
    return ""


class House:
    """A network with some computers, by name. Nothing outside can be reached from it, nor it from outside."""

    def __init__(self, *names: str) -> None:
        self._tag = secrets.token_hex(2)
        self.addresses = {name: f"{_NET}.{number}" for number, name in enumerate(names, 1)}
        self._undo = contextlib.ExitStack()
        self._processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> House:
        try:
            self._build()
        except BaseException:
            self._undo.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.close()

    def _build(self) -> None:
        hall = self.namespace("hall")
        self._make(hall)
        _ip("-n", hall, "link", "add", "bridge", "type", "bridge")
        _ip("-n", hall, "link", "set", "bridge", "up")
        hosts = "127.0.0.1 localhost\n" + "".join(
            f"{address} {name}\n" for name, address in self.addresses.items()
        )
        for number, (name, address) in enumerate(self.addresses.items()):
            namespace = self.namespace(name)
            self._make(namespace)
            # `ip netns exec` shows this file as /etc/hosts.
            folder = Path("/etc/netns") / namespace
            folder.mkdir(parents=True)
            self._undo.callback(shutil.rmtree, folder)
            (folder / "hosts").write_text(hosts)
            plug = f"plug{number}"
            _ip("-n", namespace, "link", "add", "eth0", "type", "veth", "peer", "name", plug, "netns", hall)
            _ip("-n", hall, "link", "set", plug, "master", "bridge", "up")
            _ip("-n", namespace, "address", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", namespace, "link", "set", device, "up")

    def _make(self, namespace: str) -> None:
        _ip("netns", "add", namespace)
        self._undo.callback(_ip, "netns", "del", namespace)

    def namespace(self, name: str) -> str:
        return f"zeoid-{self._tag}-{name}"

    def on(self, name: str, command: Sequence[str]) -> list[str]:
        """*command*, as it is to be given to have it run on a computer."""
        return ["ip", "netns", "exec", self.namespace(name), *command]

    def run(self, name: str, *command: str, **keywords: Any) -> subprocess.CompletedProcess[str]:
        """Run a command there to its end; it has 60 seconds."""
        keywords = {"capture_output": True, "text": True, "timeout": 60.0, **keywords}
        return subprocess.run(self.on(name, command), check=False, **keywords)

    def start(
        self, name: str, *command: str, log: Path, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Start a command there; it is killed in the end. What it says goes to *log*."""
        with log.open("w") as output:
            process = subprocess.Popen(
                self.on(name, command),
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, text=True,
                env=environment,
            )  # fmt: skip
        self._undo.callback(_end, process)
        return process

    @contextlib.contextmanager
    def here(self, name: str) -> Any:
        """This thread is on that computer meanwhile: sockets that it opens belong there."""
        libc = ctypes.CDLL(None, use_errno=True)
        own = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        there = os.open(f"/run/netns/{self.namespace(name)}", os.O_RDONLY)
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


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(20.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
