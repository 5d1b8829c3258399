"""Storages as users name them on a command line: a data file, a URI, a ZConfig file, the address of a server.

Owns which of them is meant, and that a name that can't be opened is told in one line. Opens what it is given
with the field's own libraries (ZODB, ZConfig, zodburi); must not know what the storages are for, but whether
anything is to be written.
"""

import io
import os
import re
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ZConfig
import ZODB.config
from zc.lockfile import LockError
from ZODB.FileStorage import FileStorage

from zeoid.addresses import parse_address
from zeoid.config import uris
from zeoid.engines.datafile import MAGIC_BYTES, MAGICS
from zeoid.engines.disk import Disk
from zeoid.engines.opening import open_data_file
from zeoid.engines.recovery import check_belonging, check_complete, journal_directory
from zeoid.errors import ClientError, ConfigurationError
from zeoid.model import frozen

_URI = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*):(//|\()", re.IGNORECASE)
_ADDRESS = re.compile(r"(\[[^]]+\]|[^/:]*):\d+")
_CONFIGURATION_NAME = re.compile(r".*\.(conf|cfg|xml|zcml|ini)", re.IGNORECASE)
_PASSWORD = re.compile(r"(?<=:)[^:@/]*(?=@)|(?<=password=)[^&]*|(?<=passwd=)[^&]*")
_CLIENT_LABEL = "zeoid copy"

#: For whoever opens no server.
_NO_OPTIONS: Mapping[str, Any] = {}

Opener = Callable[[], Any]


@frozen
class NamedStorage:
    """A storage that a user named; a password in the name is hidden.

    `open()` raises nothing but ConfigurationError, with one line.
    """

    name: str
    _opener: Opener

    def open(self) -> Any:
        try:
            return self._opener()
        except ConfigurationError:
            raise
        except LockError:
            text = f"{self.name} is in use by another process, which holds its lock file; stop that one first"
        except OSError as problem:
            text = f"can't open {self.name}: {problem.strerror or problem}"
        except ClientError as problem:  # which says what is wrong, and with which server
            text = f"can't open {self.name}: {problem}"
        except Exception as problem:  # whatever a storage of anybody's raises
            text = f"can't open {self.name}: {type(problem).__name__}: {problem}"
        # Not in the except clause: the error would keep what was half opened open.
        raise ConfigurationError(" ".join(text.split()))


def named_storage(
    text: str,
    *,
    blob_directory: str | None = None,
    writing: bool = False,
    client_options: Mapping[str, Any] = _NO_OPTIONS,
) -> NamedStorage:
    """The storage that *text* names, which will be opened to read it, or for *writing*.

    *blob_directory* goes with a data file only. *client_options* are arguments of a ClientStorage, if it is
    one and its URI has no options for them. ConfigurationError if it isn't clear what is meant.
    """
    name = _hidden(text)
    opener: Opener | None
    if _URI.match(text):
        kind, opener = _of_uri(text, writing, client_options)
    else:
        kind, opener = _of_path(text, writing, client_options)
    if opener is None:
        return NamedStorage(name, lambda: _open_data_file(text, blob_directory, writing))
    if blob_directory is not None:
        raise ConfigurationError(f"{name} is {kind}: name its blob directory there, not in an option")
    return NamedStorage(name, opener)


def _hidden(text: str) -> str:
    return _PASSWORD.sub("***", text) if _URI.match(text) else text


def _of_path(text: str, writing: bool, options: Mapping[str, Any]) -> tuple[str, Opener | None]:
    """What kind of thing is named, and how to open it; no opener for a data file."""
    try:
        mode = os.stat(text).st_mode
    except OSError:
        return _of_missing(text, writing, options)
    if stat.S_ISSOCK(mode):
        return "a server's socket", _client_opener(os.path.abspath(text), writing, options)
    if stat.S_ISREG(mode) and os.path.getsize(text):
        with open(text, "rb") as file:
            if file.read(MAGIC_BYTES) not in MAGICS:
                return "a configuration file", _configured(text, "", writing)
    return "", None


def _of_missing(text: str, writing: bool, options: Mapping[str, Any]) -> tuple[str, Opener | None]:
    path, _, section = text.partition("#")
    if section and os.path.isfile(path):
        return "a configuration file", _configured(path, section, writing)
    if _CONFIGURATION_NAME.fullmatch(path):
        raise ConfigurationError(f"there is no configuration file {path}")
    if _ADDRESS.fullmatch(text):
        return "a server's address", _client_opener(text, writing, options)
    return "", None


def _client_opener(address: str, writing: bool, options: Mapping[str, Any]) -> Opener:
    def opener() -> Any:
        from zeoid.client.storage import ClientStorage

        return ClientStorage(
            parse_address(address), read_only=not writing, client_label=_CLIENT_LABEL, **options
        )  # fmt: skip

    return opener


# Data files -------------------------------------------------------------------------------------------


def _open_data_file(text: str, blob_directory: str | None, writing: bool) -> Any:
    path = Path(text)
    if not writing and not path.exists():
        raise ConfigurationError(
            f"{text} does not exist, and is no URI and no address (write host:port, or a scheme and ://)"
        )
    if not writing and blob_directory is not None and not os.path.isdir(blob_directory):
        raise ConfigurationError(f"there is no blob directory {blob_directory}")
    _check_journal(os.path.abspath(path), writing)
    return open_data_file(path, not writing, blob_directory)


def _check_journal(path: str, writing: bool) -> None:
    """The data file is whole without its journal; when it is written to, the two belong together."""
    disk = Disk()
    if not disk.exists(journal_directory(path)):
        return
    if not disk.exists(path):
        raise ConfigurationError(
            f"{path} does not exist, but {journal_directory(path)} does: move that away first"
        )
    if writing:
        check_belonging(path, disk)
    else:
        check_complete(path, disk)


def _checked(opener: Opener, writing: bool) -> Opener:
    """The same for a data file that a URI or a configuration names, once it is open."""

    def checking() -> Any:
        storage = opener()
        if isinstance(storage, FileStorage):
            try:
                _check_journal(os.path.abspath(storage.getName()), writing)
            except BaseException:
                storage.close()
                raise
        return storage

    return checking


# URIs -------------------------------------------------------------------------------------------------


def _of_uri(uri: str, writing: bool, options: Mapping[str, Any]) -> tuple[str, Opener]:
    scheme, name = uri.partition(":")[0], _hidden(uri)
    if scheme == uris.SCHEME:
        opener, leftovers = uris.resolve(_with_options(uri, writing), options)
        if leftovers:
            raise ConfigurationError(f"{name}: no such option: {', '.join(leftovers)}")
        return "a URI", opener
    try:
        import zodburi
    except ImportError:
        raise ConfigurationError(
            f"{name} is a URI, for which the package zodburi is needed: pip install 'zeoid[uri]'"
        ) from None
    try:
        opener, _ = zodburi.resolve_uri(_with_options(uri, writing))
    except zodburi.NoResolverForScheme:
        raise ConfigurationError(
            f"{name}: no package that is installed understands storages of the scheme {scheme}://"
        ) from None
    except Exception as problem:  # whatever a resolver of anybody's raises
        text = " ".join(f"{type(problem).__name__}: {_hidden(str(problem))}".split())
        raise ConfigurationError(f"{name} can't be read: {text}") from None
    return "a URI", _checked(opener, writing)


def _with_options(uri: str, writing: bool) -> str:
    """Add what is wanted where the scheme is known and the URI doesn't say it itself.

    A source is opened to be read only: FileStorage would make it, lock it, or cut it off at a damaged place.
    """
    wanted = {
        "file": {} if writing else {"read_only": "1"},
        "zeoid": {"client_label": _CLIENT_LABEL} | ({} if writing else {"read_only": "1"}),
    }.get(uri.partition(":")[0], {})
    for name, value in wanted.items():
        if not re.search(rf"[?&]{name}=", uri):
            uri += f"{'&' if '?' in uri else '?'}{name}={value}"
    return uri


# Configuration files ----------------------------------------------------------------------------------

_SCHEMA = """
<schema>
  <import package="ZODB"/>
  <multisection type="ZODB.storage" name="*" attribute="storages"/>
  <multisection type="ZODB.database" name="*" attribute="databases"/>
</schema>
"""


def _configured(path: str, name: str, writing: bool) -> Opener:
    """Opens the storage in the file, or that of the database; of several, the one with the *name*."""
    section = _section(path, name)
    if not writing:
        _never_write(section)
    return _checked(section.open, writing)


def _section(path: str, name: str) -> Any:
    try:
        with open(path, encoding="utf-8") as file:
            schema = ZConfig.loadSchemaFile(io.StringIO(_SCHEMA))
            config, _ = ZConfig.loadConfigFile(schema, file, url=Path(path).resolve().as_uri())
    except OSError as problem:
        raise ConfigurationError(f"can't read {path}: {problem.strerror}") from None
    except (UnicodeDecodeError, ZConfig.ConfigurationError, ImportError) as problem:
        text = " ".join(str(problem).split())
        raise ConfigurationError(
            f"{path} is no data file, and no configuration file with a storage: {text}"
        ) from None
    found = [(section.name, section) for section in config.storages]
    found += [(database.name, database.config.storage) for database in config.databases]
    chosen = [section for title, section in found if not name or title == name]
    if len(chosen) == 1:
        return chosen[0]
    if found and not chosen:
        raise ConfigurationError(f"{path}: no storage or database there has the name {name}")
    if not found:
        raise ConfigurationError(f"{path}: there is no storage and no database in it")
    raise ConfigurationError(f"{path}: there are several storages in it; write {path}#NAME to choose one")


def _never_write(section: Any) -> None:
    """FileStorage would make the file, lock it, or cut it off at a damaged place."""
    if type(section) is ZODB.config.FileStorage:
        section.config.read_only = True
        section.config.create = False
    base = getattr(section.config, "base", None)
    if base is not None:
        _never_write(base)
