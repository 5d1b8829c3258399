"""What the figures were measured on, and with: read from the running system, kept with the figures."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("zeoid", "ZODB", "ZEO", "msgpack", "uvloop")
IN_MEMORY = ("tmpfs", "ramfs")


def machine(folder: Path) -> dict[str, str | int]:
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count() or 0,
        "usable_cores": len(os.sched_getaffinity(0)),
        "kernel": f"{platform.system()} {platform.release()}",
        "file_system": file_system(folder),
    }


def versions() -> dict[str, str]:
    found = {"Python": f"{platform.python_version()} ({platform.python_implementation()})"}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = _version_of_source(package)
    return found


def file_system(folder: Path) -> str:
    """The type of the file system that a folder is on, such as ext4."""
    best, kind = "", "unknown"
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mount, type_, *_ = line.split()
        if folder.resolve().is_relative_to(mount) and len(mount) >= len(best):
            best, kind = mount, type_
    return kind


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        field, _, value = line.partition(":")
        if field.strip() == "model name":
            return value.strip()
    return platform.machine()


def _version_of_source(package: str) -> str:
    """A package that is on the path but was not installed, as during development."""
    try:
        return f"{__import__(package).__version__} (not installed)"
    except (ImportError, AttributeError):
        return "absent"
