"""The directory of a shared object cache: made, joined, taken over, removed, set aside; and its locks.

`cache_dir` belongs to one user and holds, for each storage and the addresses of its servers (the *key*),

    <key>.lock                 whoever makes, joins or removes an environment has this, with a deadline
    .new-…, .gone-…            one that is not whole yet, or not any more
    <key>-<boot>-<namespace>/  one environment, for the processes of one boot and one pid namespace
        about.json             version, key, size, identity; never changes
        data.mdb, lock.mdb     LMDB's; data.mdb has its full length from the beginning
        users                  whoever uses the environment has this shared
        write                  whoever writes has this, with a deadline

    what is found                                                becomes
    nothing                                                      made, under another name until it is whole
    an environment that is sound                                 joined
    one that is not (version, key, length, LMDB's own checks)    removed and made anew, unless others use it
    one of this boot, another namespace, and nobody uses it      taken over, if there is none of ours
    another one that nobody uses, or what was left of one        removed
    one that others use                                          left alone
    not a directory of ours that only we can read                refused (`Unusable`)

Invariants:
 1. LMDB's own two locks (of its writer and of its table of readers), which nobody can wait for with a
    deadline and which a stopped process may hold for ever, are only taken by whoever has `write`. So a
    process takes all the readers' places that it will ever need while it opens the environment.
 2. An environment that someone may have mapped is never made shorter, only unlinked.
 3. One process has an environment open once, and none while it forks: a child that closed what it inherited
    would give up the places of its parent's readers.

An LMDB environment that is never synced survives the death of any process that writes to it, but not that of
the machine: hence the boot. Source: LMDB's documentation (lmdb.h, "Caveats" and "Restrictions").

Long because the table above is one thing, and each of its rows is a few lines.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import secrets
import shutil
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import lmdb

from zeoid import limits
from zeoid.cache.locks import lock, open_file, unlock
from zeoid.cache.records import DATABASES, VERSION, Records, State

log = logging.getLogger("zeoid.cache")

_ABOUT = "about.json"
_DATA = "data.mdb"
_USERS = "users"
_WRITE = "write"


class Unusable(Exception):
    """There can be no shared cache here; why, in words for whoever chose the directory."""


class Environment:
    """One that is open. Made by `join`; whoever has one owes `leave`."""

    records: Records

    def __init__(self, path: Path, size_bytes: int) -> None:
        """Open what is there, ours, and sound as far as can be seen from outside. lmdb.Error, OSError."""
        self.path = path
        self.size_bytes = size_bytes
        self._files = contextlib.ExitStack()
        self._thread_lock = threading.Lock()
        self._is_open = False
        #: By how many of this process. The registry's.
        self.joined = 0
        with contextlib.ExitStack() as opened:
            users = open_file(path / _USERS)
            opened.callback(os.close, users)
            lock(users, shared=True, timeout_s=limits.SHARED_CACHE_OPEN_S)
            self._write_file = open_file(path / _WRITE)
            opened.callback(os.close, self._write_file)
            #: No other one has it, on this disk or any.
            self.identity = _identity(path)
            self._open()
            self._files = opened.pop_all()

    def _open(self, *, again: bool = False) -> None:
        with self._file_lock(limits.SHARED_CACHE_OPEN_S):
            env = _open_lmdb(self.path, self.size_bytes)
            try:
                env.reader_check()
                if again:
                    self.records.attach(env)  # the same ones: who waits for them finds them
                else:
                    self.records = Records(env, create=False)
                # So many are kept for those who read.
                for txn in [env.begin() for _ in range(limits.SHARED_CACHE_READS_AT_ONCE)]:
                    txn.abort()
            except BaseException:
                env.close()
                raise
        self._env = env
        self._is_open = True
        self.records.begin_reading()

    @contextlib.contextmanager
    def writing(self, timeout_s: float) -> Iterator[tuple[lmdb.Transaction, State]]:
        """A write transaction, with the state as it is; the state as it is left in the end is written.

        TimeoutError if others have the lock for longer than *timeout_s*. lmdb.Error.
        """
        with self._write_lock(timeout_s), self._env.begin(write=True) as txn:
            state = self.records.state(txn)
            yield txn, state
            self.records.write_state(txn, state)

    def clear_dead_readers(self) -> None:
        """Let room be used that a process held on to which was killed while it read. Within `writing`."""
        self._env.reader_check()

    @contextlib.contextmanager
    def _write_lock(self, timeout_s: float) -> Iterator[None]:
        deadline_s = time.monotonic() + timeout_s
        if not self._thread_lock.acquire(timeout=timeout_s):
            raise TimeoutError
        try:
            if not self._is_open:
                raise lmdb.Error("it is closed")
            with self._file_lock(deadline_s - time.monotonic()):
                yield
        finally:
            self._thread_lock.release()

    @contextlib.contextmanager
    def _file_lock(self, timeout_s: float) -> Iterator[None]:
        lock(self._write_file, shared=False, timeout_s=timeout_s)
        try:
            yield
        finally:
            unlock(self._write_file)

    # What the registry does -----------------------------------------------------------------------

    def close(self) -> None:
        """Wait for those who read and write, and close it. If that takes for ever it stays open, and used."""
        if self._thread_lock.acquire(timeout=limits.SHARED_CACHE_OPEN_S):
            self._close_lmdb()
            if not self._is_open:
                self._files.close()
            self._thread_lock.release()

    def _close_lmdb(self) -> None:
        if self._is_open:
            with contextlib.suppress(TimeoutError):  # somebody reads for ever: leave it open
                self.records.end_reading(limits.SHARED_CACHE_OPEN_S)
                self._env.close()
                self._is_open = False

    def pause(self) -> None:
        """Have nothing open of LMDB's, until `go_on`.

        Whoever reads meanwhile finds nothing, whoever writes waits."""
        self._thread_lock.acquire()
        self._close_lmdb()

    def go_on(self) -> None:
        """After `pause`. If it can't be opened again, whoever writes to it finds that out."""
        try:
            if not self._is_open:
                self._open(again=True)
        except (OSError, lmdb.Error) as problem:
            log.warning("%s: can't be opened again after a fork: %s", self.path, problem)
        finally:
            self._thread_lock.release()

    def abandon(self) -> None:
        """Close what a forked child has of its parent's paused environment."""
        self._files.close()


# Joining ----------------------------------------------------------------------------------------------

_registry_lock = threading.Lock()
#: Those that are joined by whoever comes, and all that are open.
_joined: dict[Path, Environment] = {}
_all: set[Environment] = set()


def join(cache_dir: str | os.PathLike[str], key: str, size_bytes: int) -> Environment:
    """The environment for *key* in *cache_dir*, made if need be, *size_bytes* long then. Unusable."""
    directory = Path(os.path.abspath(cache_dir))
    try:
        with _registry_lock:
            _look_at_directory(directory)
            path = directory / f"{_name(key)}-{_boot()}-{_namespace()}"
            environment = _joined.get(path)
            if environment is None:
                with _key_lock(path):
                    environment = _joined[path] = _make_or_open(directory, path, key, size_bytes)
                _all.add(environment)
            environment.joined += 1
            return environment
    except TimeoutError:
        raise Unusable(f"{directory}: another process holds the lock of the object cache") from None
    except ImportError:
        raise Unusable("this system has no locks that processes can share") from None
    except (OSError, lmdb.Error) as problem:
        reason = problem.strerror if isinstance(problem, OSError) and problem.strerror else str(problem)
        raise Unusable(f"{directory}: {reason}") from problem


def leave(environment: Environment) -> None:
    """It is not used any more by one of those who joined it."""
    with _registry_lock:
        environment.joined -= 1
        if not environment.joined:
            if _joined.get(environment.path) is environment:
                del _joined[environment.path]
            _all.discard(environment)
            environment.close()


def set_aside(environment: Environment) -> None:
    """Whoever joins from now on gets another one. Those who have this one may go on with it."""
    with _registry_lock:
        if _joined.get(environment.path) is environment:
            del _joined[environment.path]
        # If the lock can't be had, whoever has it is making another one, or stopped.
        with contextlib.suppress(OSError, ValueError), _key_lock(environment.path):
            if _identity(environment.path) == environment.identity:
                _remove(environment.path)


def clear(cache_dir: str | os.PathLike[str]) -> list[Path]:
    """Remove every environment in a cache directory, in use or not; which ones. OSError.

    Those who use one go on with it, and share it with nobody who comes later.
    """
    directory = Path(os.path.abspath(cache_dir))
    found = environments(directory)
    for path in found:
        with _key_lock(path):
            _remove(path)
    return found


def environments(cache_dir: Path) -> list[Path]:
    """The directories of environments in a cache directory. OSError."""
    found = [path for path in cache_dir.iterdir() if not path.name.startswith(".")]
    return sorted(path for path in found if (path / _ABOUT).is_file())


def about(path: Path) -> dict[str, object]:
    """What an environment's directory says of itself, see above. OSError, ValueError."""
    said = json.loads((path / _ABOUT).read_text("utf-8"))
    if not isinstance(said, dict):
        raise ValueError("it says nothing of itself")
    return said


@contextlib.contextmanager
def look_into(path: Path) -> Iterator[Environment]:
    """One of `environments`, open for a while without being joined. Unusable, with what is wrong with it."""
    if path.name.split("-")[-2:] != [_boot(), _namespace()]:
        raise Unusable("it is of another boot of the machine, or of another container")
    if reason := _fault(path):
        raise Unusable(reason)
    try:
        environment = Environment(path, _size(path))
    except (OSError, ValueError, lmdb.Error) as problem:
        raise Unusable(str(problem)) from None
    try:
        yield environment
    finally:
        environment.close()


def is_used(path: Path) -> bool:
    """Whether any process uses the environment at this moment. OSError."""
    file = open_file(path / _USERS)
    try:
        lock(file, shared=False, timeout_s=0)
        return False
    except TimeoutError:
        return True
    finally:
        os.close(file)


def _look_at_directory(directory: Path) -> None:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = directory.stat()
    if not stat.S_ISDIR(found.st_mode):
        raise Unusable(f"{directory} is not a directory")
    if hasattr(os, "geteuid") and found.st_uid != os.geteuid():
        raise Unusable(f"{directory} belongs to another user")
    if found.st_mode & 0o022:
        raise Unusable(f"others may write to {directory}")


def _make_or_open(directory: Path, path: Path, key: str, size_bytes: int) -> Environment:
    for left in directory.glob(f".*-{_name(key)}-*"):
        shutil.rmtree(left, ignore_errors=True)  # whoever made or removed it was killed
    for other in sorted(directory.glob(f"{_name(key)}-*")):
        if other != path:
            _take_over_or_remove(other, path)
    if path.exists():
        reason = _fault(path, key)
        if not reason:
            try:
                return Environment(path, _size(path))
            except (lmdb.Error, ValueError) as problem:
                reason = str(problem)
        if is_used(path):
            raise Unusable(f"{path}: {reason}; other processes use it")
        log.warning("%s is made anew: %s", path, reason)
        _remove(path)
    _make(path, key, size_bytes)
    return Environment(path, size_bytes)


def _fault(path: Path, key: str | None = None) -> str:
    """What is wrong with the environment, as far as can be seen from outside."""
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or stat.S_IMODE(found.st_mode) != 0o700:
        return "it is no directory that only its owner can read"
    try:
        said = about(path)
    except (OSError, ValueError):
        return "it does not say what it is"
    if said.get("version") != VERSION:
        return f"it is of version {said.get('version')!r}, not {VERSION}"
    if key is not None and said.get("key") != key:
        return "it is another storage's"
    try:
        length = (path / _DATA).stat().st_size
    except OSError:
        return "it has no data"
    if length != said.get("size_bytes"):
        return "it was cut off"
    return ""


def _make(path: Path, key: str, size_bytes: int) -> None:
    new = path.with_name(f".new-{path.name}")
    try:
        new.mkdir(mode=0o700)
        said = {"version": VERSION, "key": key, "size_bytes": size_bytes, "identity": secrets.token_hex(16)}
        (new / _ABOUT).touch(mode=0o600)
        (new / _ABOUT).write_text(json.dumps(said), "utf-8")
        env = _open_lmdb(new, size_bytes)
        try:
            Records(env, create=True)
        finally:
            env.close()
        os.truncate(new / _DATA, size_bytes)
        new.rename(path)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def _open_lmdb(path: Path, size_bytes: int) -> lmdb.Environment:
    # Not synced: see above. Not WRITEMAP: a full disk would kill the process.
    return lmdb.open(
        str(path), map_size=size_bytes, max_dbs=DATABASES, mode=0o600,
        max_readers=limits.SHARED_CACHE_READERS, max_spare_txns=limits.SHARED_CACHE_READS_AT_ONCE,
        sync=False, metasync=False, readahead=False,
    )  # fmt: skip


def _take_over_or_remove(other: Path, path: Path) -> None:
    """*other* is an environment of another boot or namespace, or what was left of one."""
    with contextlib.suppress(OSError):
        if not (other / _ABOUT).is_file():
            if not other.is_file():
                _remove(other)
        elif not is_used(other):
            if not path.exists() and other.name.split("-")[-2] == _boot():
                # Its readers and its lock's owner, whose numbers mean other processes here, are all gone.
                with contextlib.suppress(FileNotFoundError):
                    (other / "lock.mdb").unlink()
                other.rename(path)
            else:
                _remove(other)


def _remove(path: Path) -> None:
    """Remove an environment, and first of all its name."""
    gone = path.with_name(f".gone-{path.name}-{secrets.token_hex(8)}")
    path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _size(path: Path) -> int:
    return (path / _DATA).stat().st_size


def _identity(path: Path) -> str:
    """OSError, ValueError."""
    if isinstance(said := about(path).get("identity"), str):
        return said
    raise ValueError("it has no identity")


def _name(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:16]


@functools.cache
def _boot() -> str:
    """What differs between boots of this machine."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", "")[:16]
    except OSError:
        return "0"


def _namespace() -> str:
    """What differs between namespaces of process ids."""
    try:
        return str(Path("/proc/self/ns/pid").stat().st_ino)
    except OSError:
        return "0"


# Locks ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _key_lock(path: Path) -> Iterator[None]:
    """The lock of an environment's key. TimeoutError if another process has it for too long."""
    file = open_file(path.with_name(f"{path.name.partition('-')[0]}.lock"))
    try:
        lock(file, shared=False, timeout_s=limits.SHARED_CACHE_OPEN_S)
        yield
    finally:
        os.close(file)


def _before_fork() -> None:
    _registry_lock.acquire()
    for environment in _all:
        environment.pause()


def _after_fork_in_parent() -> None:
    for environment in _all:
        environment.go_on()
    _registry_lock.release()


def _after_fork_in_child() -> None:
    for environment in _all:
        environment.abandon()
    _all.clear()
    _joined.clear()
    _registry_lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child
    )
