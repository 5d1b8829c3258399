"""`zeoid serve`: run a storage server in the foreground until SIGTERM or SIGINT."""

import argparse
import asyncio
import contextlib
import gc
import logging
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from zeoid import limits, system
from zeoid.addresses import DEFAULT_PORT, TcpAddress, parse_address
from zeoid.config.serving import ServingOptions, read_configuration, storages_of_path
from zeoid.errors import ConfigurationError
from zeoid.ports import Engine
from zeoid.security.audit import AuditFile, to_file
from zeoid.server.server import StorageFailure, StorageServer, serve_forever

SUMMARY = "serve a database to other processes"

log = logging.getLogger("zeoid.server")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path", metavar="PATH", nargs="?",
        help="the data file, made if it does not exist; inside a Zope instance var/Data.fs is the default",
    )  # fmt: skip
    parser.add_argument("-h", "--host", metavar="HOST", help="the host to listen on (default: localhost)")
    parser.add_argument(
        "-p", "--port", metavar="PORT", type=_port,
        help=f"the port to listen on (default: {DEFAULT_PORT}; 0: any free one)",
    )  # fmt: skip
    parser.add_argument(
        "-a", "--address", metavar="ADDRESS", action="append",
        help="host:port, [ipv6]:port or the path of a unix socket; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "-C", "--configure", metavar="FILE", help="a configuration file, as ZEO's runzeo takes it"
    )
    parser.add_argument(
        "--blob-dir",
        metavar="DIR",
        help="the directory for blobs; made if it does not exist (default: no blobs)",
    )
    parser.add_argument("--memory", action="store_true", help="keep everything in memory, and lose it")
    parser.add_argument("--read-only", action="store_true", help="let nobody write")
    parser.add_argument("--msgpack", action="store_true", help="offer the coding M5 instead of Z5")
    parser.add_argument(
        "--transaction-timeout", metavar="SECONDS", type=_seconds,
        help="abort a transaction that is voted on and not finished in this time "
        f"(default: {limits.TRANSACTION_TIMEOUT_S:g})",
    )  # fmt: skip
    parser.add_argument(
        "--resolve-conflicts", action="store_true",
        help="resolve conflicts in the server, which imports the application's classes for that",
    )  # fmt: skip
    parser.add_argument(
        "--tls", metavar="FILE",
        help="TLS on every TCP address: a private key, its certificate, and the authority whose clients are "
        "let in, as `zeoid certs server` makes it",
    )  # fmt: skip
    parser.add_argument("--tls-key", metavar="FILE", help="the private key, if it is not in there")
    parser.add_argument("--tls-ca", metavar="FILE", help="the authorities, if they are not in there")
    parser.add_argument("--tls-revoked", metavar="FILE", help="the list of certificates that were revoked")
    parser.add_argument(
        "--tokens", metavar="FILE", help="let in whoever shows a token of this file (`zeoid tokens`), too"
    )
    parser.add_argument("--access", metavar="FILE", help="a file that says who may do what")
    parser.add_argument(
        "--default-role", metavar="ROLE", help="the role of certificates that have none (default: write)"
    )
    parser.add_argument(
        "--audit-log", metavar="FILE",
        help="write a line for whoever connects, is refused, packs or undoes to this file",
    )  # fmt: skip
    parser.add_argument(
        "--insecure", action="store_true",
        help="listen without TLS on addresses that other machines reach, and let them do everything",
    )  # fmt: skip
    parser.add_argument(
        "--max-connections", metavar="N", type=_count,
        help=f"connections that are taken, in all (default: {limits.CONNECTIONS})",
    )  # fmt: skip
    parser.add_argument(
        "--max-connections-each", metavar="N", type=_count,
        help="connections of one certificate's or token's name, or of one address where there is no name "
        f"(default: {limits.CONNECTIONS_PER_IDENTITY})",
    )  # fmt: skip
    parser.add_argument(
        "--max-memory", metavar="MB", type=_count,
        help="what may be held for clients in all: transactions that are not committed, messages that come, "
        f"replies that are not read (default: {limits.HELD_BYTES // 1024**2})",
    )  # fmt: skip
    parser.add_argument(
        "--max-blob", metavar="MB", type=_count,
        help=f"the largest blob that is taken (default: {limits.BLOB_BYTES // 1024**2})",
    )  # fmt: skip
    parser.add_argument("--pid-file", metavar="FILE", help="write the process id to this file")
    parser.add_argument("--quiet", action="store_true", help="log warnings and errors only")


_SECURITY = (
    "tls", "tls_key", "tls_ca", "tls_revoked", "tokens", "access", "default_role", "audit_log", "insecure",
)  # fmt: skip


def _port(text: str) -> int:
    if text.isascii() and text.isdigit() and int(text) < 65536:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no port (0 to 65535)")


def _count(text: str) -> int:
    if text.isascii() and text.isdigit() and 0 < (value := int(text)) < 1e9:
        return value
    raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (value := float(text)) < 1e9:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is no time in seconds")


def options(arguments: argparse.Namespace) -> ServingOptions:
    """The configuration file, if there is one, with what the command line says on top."""
    given = ServingOptions()
    if arguments.configure:
        given = read_configuration(arguments.configure)
        if arguments.path or arguments.memory or arguments.blob_dir:
            raise ConfigurationError(
                "the storages are in the configuration file, with their blob directories: leave them out"
            )
    if arguments.read_only:
        given = replace(given, read_only=True)
    if not arguments.configure:
        given = replace(
            given,
            storages=storages_of_path(
                arguments.path,
                blob_dir=arguments.blob_dir,
                memory=arguments.memory,
                read_only=given.read_only,
            ),
        )
    if arguments.address:
        if arguments.host or arguments.port is not None:
            raise ConfigurationError("give --address, or --host and --port, not both")
        given = replace(given, addresses=tuple(parse_address(text) for text in arguments.address))
    elif arguments.host or arguments.port is not None:
        port = DEFAULT_PORT if arguments.port is None else arguments.port
        given = replace(given, addresses=(TcpAddress(arguments.host or "localhost", port),))
    if arguments.msgpack:
        given = replace(given, offer="M5")
    if arguments.transaction_timeout is not None:
        given = replace(given, transaction_timeout_s=arguments.transaction_timeout)
    if arguments.resolve_conflicts:
        given = replace(given, resolve_conflicts=True)
    if arguments.tls and given.security.tls:
        raise ConfigurationError("the certificate is in the configuration file: leave --tls out")
    chosen = {name: value for name in _SECURITY if (value := getattr(arguments, name))}
    given = replace(given, security=replace(given.security, **chosen))
    if arguments.max_connections is not None:
        given = replace(given, max_connections=arguments.max_connections)
    if arguments.max_connections_each is not None:
        given = replace(given, max_connections_each=arguments.max_connections_each)
    if arguments.max_memory is not None:
        given = replace(given, max_memory_bytes=arguments.max_memory * 1024**2)
    if arguments.max_blob is not None:
        given = replace(given, max_blob_bytes=arguments.max_blob * 1024**2)
    if arguments.pid_file:
        given = replace(given, pid_file=Path(arguments.pid_file))
    return given


def run(arguments: argparse.Namespace) -> int:
    given = options(arguments)
    _start_log(given, logging.WARNING if arguments.quiet else logging.INFO)
    system.allow_more_files()
    security = given.security.server_options()
    with contextlib.ExitStack() as stack:
        audit_file = _audit_file(given)
        if audit_file is not None:
            stack.callback(audit_file.close)
        engines = _open_all(given)
        server = StorageServer(
            engines,
            read_only=given.read_only,
            offer=given.offer,
            transaction_timeout_s=given.transaction_timeout_s,
            invalidation_log_transactions=given.invalidation_log_transactions,
            resolve_conflicts=given.resolve_conflicts,
            max_connections=given.max_connections,
            max_connections_each=given.max_connections_each,
            max_memory_bytes=given.max_memory_bytes,
            max_blob_bytes=given.max_blob_bytes,
            **security,
        )

        def on_loop(loop: asyncio.AbstractEventLoop) -> None:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, _stopping, server, number)
            loop.add_signal_handler(signal.SIGHUP, _reloading, server, audit_file)

        def on_ready(loop: asyncio.AbstractEventLoop) -> None:
            # What was made so far lives as long as the process: the garbage collector need not look at it.
            gc.freeze()
            # Not before: a server that can't start must leave the file of the one that runs alone.
            stack.enter_context(_pid_file(given.pid_file))

        try:
            serve_forever(server, given.addresses, on_loop=on_loop, on_ready=on_ready)
        except StorageFailure:
            return 1  # the log has said why
    return 0


def _stopping(server: StorageServer, number: signal.Signals) -> None:
    log.info("stopping on %s", number.name)
    server.stop()


def _reloading(server: StorageServer, audit_file: AuditFile | None) -> None:
    log.info("looking at certificates again on SIGHUP")
    server.reload_certificates()
    if audit_file is not None:
        try:
            audit_file.reopen()
        except OSError as problem:
            log.error("the audit log can't be opened anew, the old file is used: %s", problem)


def _audit_file(given: ServingOptions) -> AuditFile | None:
    path = given.security.audit_log
    if path is None:
        return None
    try:
        return to_file(path)
    except OSError as problem:
        raise ConfigurationError(f"can't write the audit log {path}: {problem.strerror}") from None


def _start_log(given: ServingOptions, level: int) -> None:
    if given.start_log is not None:
        given.start_log()
    else:
        logging.basicConfig(
            stream=sys.stderr, level=level, format="%(asctime)s %(levelname)s %(message)s"
        )  # fmt: skip


def _open_all(given: ServingOptions) -> dict[str, Engine]:
    engines: dict[str, Engine] = {}
    try:
        for name, opener in given.storages.items():
            engines[name] = opener()
            log.info("storage %r: %s", name, engines[name].name)
    except BaseException:
        for engine in engines.values():
            engine.close()
        raise
    return engines


@contextlib.contextmanager
def _pid_file(path: Path | None) -> Iterator[None]:
    """A file with the process id, which is removed at the end unless another process has written its own."""
    if path is None:
        yield
        return
    mine = f"{os.getpid()}\n"
    try:
        path.write_text(mine)
    except OSError as problem:
        raise ConfigurationError(f"can't write {path}: {problem.strerror}") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if path.read_text() == mine:
                path.unlink()
