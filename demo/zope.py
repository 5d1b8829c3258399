"""One Zope: its instance on disk, its process, and a user who works with it over HTTP.

Owns what is particular to Zope: configuration files, the initial user, addresses of the management interface.
Must not know that there are other Zopes, nor who answers behind the `<zeoclient>` section.
"""

import base64
import http.client
import os
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from urllib.parse import urlencode

from demo.processes import DemoError, Process, Workspace

START_TIMEOUT_S = 90.0
REQUEST_TIMEOUT_S = 30.0
INHERITED = ("HOME", "LANG", "LC_ALL", "PATH")

DATABASE = """\
<zodb_db main>
  mount-point /
  <zeoclient>
    server {server}
  </zeoclient>
</zodb_db>
"""

# Port 0: the system picks a free one, and waitress says in the log which it was.
ZOPE_INI = """\
[app:zope]
use = egg:Zope#main
zope_conf = %(here)s/zope.conf

[pipeline:main]
pipeline = egg:Zope#httpexceptions zope

[server:main]
use = egg:waitress#main
host = 127.0.0.1
port = 0

[loggers]
keys = root

[handlers]
keys = console

[formatters]
keys = line

[logger_root]
level = INFO
handlers = console

[handler_console]
class = StreamHandler
args = (sys.stderr,)
formatter = line

[formatter_line]
format = %(asctime)s %(levelname)s %(name)s %(message)s
"""


@dataclass(frozen=True)
class User:
    name: str
    password: str

    @property
    def authorization(self) -> str:
        return "Basic " + base64.b64encode(f"{self.name}:{self.password}".encode()).decode()


@dataclass(frozen=True)
class ZopeVenv:
    """The environment that Zope and ZEO's own client are installed in."""

    path: Path

    def check(self) -> None:
        if not self.runwsgi.is_file():
            raise DemoError(
                f"There is no Zope in {self.path}. `make demo` installs it there;"
                " --zope-venv or ZOPE_VENV names another place."
            )

    @property
    def runwsgi(self) -> Path:
        return self.path / "bin" / "runwsgi"

    def version(self, package: str) -> str:
        folders = [str(folder) for folder in self.path.glob("lib/python*/site-packages")]
        found = distributions(name=package, path=folders)
        return next((distribution.version for distribution in found), "of unknown version")


class Zope:
    """A Zope that is starting, then running. Connections to it are made inside of *there*."""

    def __init__(
        self,
        name: str,
        process: Process,
        user: User,
        there: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.name = name
        self._process = process
        self._user = user
        self._there = there
        self._port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def wait_until_ready(self) -> None:
        serving = self._process.wait_for_line(r"Serving on http://127\.0\.0\.1:(\d+)\s", START_TIMEOUT_S)
        self._port = int(serving[1])

    def create(self, page: str, text: str) -> None:
        """Add a DTML Method to the root folder, with what the add form of the management interface posts."""
        form = {"id": page, "title": "", "file": text, "submit": "Add"}
        self._post("/manage_addProduct/OFSP/manage_addDTMLMethod", form)

    def change(self, page: str, text: str) -> None:
        """Save a new text, with what the edit form of the management interface posts."""
        self._post(f"/{page}/manage_edit", {"title": "", "data:text": text, "submit": "Save Changes"})

    def read(self, page: str) -> str | None:
        """Return what a visitor who is not logged in sees there; None when there is no such page."""
        status, body = self._request("GET", f"/{page}")
        if status == http.HTTPStatus.NOT_FOUND:
            return None
        self._expect(status, {http.HTTPStatus.OK}, f"GET /{page}")
        return body

    def _post(self, path: str, form: dict[str, str]) -> None:
        status, _ = self._request("POST", path, form)
        self._expect(status, {http.HTTPStatus.OK, http.HTTPStatus.FOUND}, f"POST {path}")

    def _expect(self, status: int, expected: set[http.HTTPStatus], request: str) -> None:
        if status not in expected:
            raise DemoError(f"{self.name} answered {request} with {status}.")

    def _request(self, method: str, path: str, form: dict[str, str] | None = None) -> tuple[int, str]:
        headers = {}
        if form is not None:
            headers["Authorization"] = self._user.authorization
            headers["Content-Type"] = "application/x-www-form-urlencoded"
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=REQUEST_TIMEOUT_S)
        try:
            with self._there():
                connection.connect()
            connection.request(method, path, None if form is None else urlencode(form), headers)
            response = connection.getresponse()
            return response.status, response.read().decode()
        except (OSError, http.client.HTTPException) as error:
            self._process.check_alive()
            raise DemoError(f"{self.name} did not answer {method} {path}: {error!r}") from error
        finally:
            connection.close()


def write_instance(folder: Path, database: str, user: User | None = None, home: Path | None = None) -> None:
    """Make the folder of an instance, which Zope will know as *home*; *database* goes into `zope.conf`.

    The first Zope on an empty database gets the file `inituser`, from which Zope makes the user. The others
    must not have it: each would make the user anew, and two that start together would conflict.
    """
    (folder / "var").mkdir(parents=True)
    (folder / "zope.conf").write_text(f"instancehome {quoted(home or folder)}\n\n{database}")
    (folder / "zope.ini").write_text(ZOPE_INI)
    if user is not None:
        (folder / "inituser").write_text(f"{user.name}:{user.password}\n")


def quoted(path: Path) -> str:
    """What stands for it in a ZConfig file."""
    return str(path).replace("$", "$$")


def environment() -> dict[str, str]:
    """A Zope's: nothing of the demo's own, such as PYTHONPATH, may change what it is."""
    return {key: os.environ[key] for key in INHERITED if key in os.environ}


def start_zope(
    workspace: Workspace, venv: ZopeVenv, name: str, server: str, user: User, *, first: bool
) -> Zope:
    """Write an instance and start Zope in it."""
    instance = workspace.folder / re.sub(r"\W", "", name.lower())
    write_instance(instance, DATABASE.format(server=server), user if first else None)
    process = workspace.start(name, [str(venv.runwsgi), str(instance / "zope.ini")], environment())
    return Zope(name, process, user)
