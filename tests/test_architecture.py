"""The map of the source, enforced: who may import whom, what stays pure, what is imported only when needed.

The rules are a table at the top; `violations` applies them to any tree, so that the rules themselves are
tested on made-up trees below. A new module at the top level of the package must be given its place here.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import zeoid

PACKAGE = "zeoid"
SOURCE = Path(zeoid.__file__).resolve().parents[1]

#: From the bottom up. A layer imports what stands below it; names on one line do not import each other.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"model", "errors", "limits"}),
    frozenset({"ports", "addresses", "retrying", "system"}),
    frozenset({"wire", "commit"}),
    frozenset({"cache", "security"}),
    frozenset({"engines"}),
    frozenset({"server", "client"}),
    frozenset({"tiers"}),
    frozenset({"admin"}),
    frozenset({"balance", "panel"}),
    frozenset({"config"}),
    frozenset({"cli"}),
    frozenset({"__main__"}),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
#: Imports anything; only itself imports it.
FREE = "testing"
#: What `from zeoid import ...` gives is for those who stand above everything, except for the version.
FACE_USERS = frozenset({"cli", "__main__", FREE})
FACE_ATTRIBUTES = frozenset({"__version__"})
#: Reading a configuration must not load a server or a client; making what it describes may.
ONLY_WHEN_NEEDED = {"config": frozenset({"server", "client"})}

PURE = frozenset({"wire", "commit"})
IMPURE_MODULES = frozenset({
    "asyncio", "concurrent", "glob", "logging", "mmap", "multiprocessing", "os", "pathlib", "queue", "random",
    "sched", "secrets", "select", "selectors", "shutil", "signal", "socket", "socketserver", "sqlite3", "ssl",
    "subprocess", "sys", "tempfile", "threading", "time", "urllib", "uuid", "_thread", "uvloop", "lmdb",
    "psycopg",
})  # fmt: skip
IMPURE_CALLS = frozenset({"open", "print", "input", "exec", "eval"})
IMPURE_METHODS = frozenset({"now", "utcnow", "today"})

UNIX_ONLY = frozenset({
    "_posixsubprocess", "crypt", "curses", "fcntl", "grp", "nis", "posix", "pty", "pwd", "readline",
    "resource", "spwd", "syslog", "termios", "tty", "uvloop",
})  # fmt: skip

MOST_LINES = 450
EXCUSE = "Long because"


@dataclass(frozen=True)
class Import:
    """One import statement, or one call that imports."""

    target: str
    line: int
    #: Inside of a function: carried out when it is called.
    lazy: bool
    #: For type checkers only.
    for_types: bool


@dataclass(frozen=True)
class Module:
    """One file of the tree."""

    name: str
    path: Path
    tree: ast.Module
    lines: int

    @property
    def layer(self) -> str:
        """The name below the package that decides where this module stands; empty for the face."""
        return self.name.partition(".")[2].partition(".")[0]

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"


def modules(root: Path) -> list[Module]:
    found = []
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        text = path.read_text(encoding="utf-8")
        found.append(Module(name, path, ast.parse(text, str(path)), text.count("\n")))
    return found


# Reading imports --------------------------------------------------------------------------------------


class _Imports(ast.NodeVisitor):
    def __init__(self, module: Module, known: frozenset[str]) -> None:
        self.found: list[Import] = []
        self._module = module
        self._known = known
        self._functions = 0
        self._types = 0

    def _add(self, target: str, node: ast.AST) -> None:
        line = getattr(node, "lineno", 0)
        self.found.append(Import(target, line, self._functions > 0, self._types > 0))

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> None:
        self._functions += 1
        self.generic_visit(node)
        self._functions -= 1

    visit_AsyncFunctionDef = visit_FunctionDef
    visit_Lambda = visit_FunctionDef

    def visit_If(self, node: ast.If) -> None:
        name = node.test.attr if isinstance(node.test, ast.Attribute) else getattr(node.test, "id", "")
        if name != "TYPE_CHECKING":
            self.generic_visit(node)
            return
        self._types += 1
        for statement in node.body:
            self.visit(statement)
        self._types -= 1
        for statement in node.orelse:
            self.visit(statement)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(f"{PACKAGE}.*" if alias.name == PACKAGE else alias.name, node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = node.module or ""
        if node.level:
            parts = self._module.name.split(".")
            above = parts[: len(parts) - node.level + self._module.is_package]
            base = ".".join([*above, base] if base else above)
        for alias in node.names:
            inner = f"{base}.{alias.name}"
            of_face = base == PACKAGE and alias.name not in FACE_ATTRIBUTES
            self._add(inner if inner in self._known or of_face else base, node)

    def visit_Call(self, node: ast.Call) -> None:
        function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if function in ("import_module", "__import__") and node.args:
            named = node.args[0]
            if isinstance(named, ast.Constant) and isinstance(named.value, str):
                self._add(named.value, node)
        self.generic_visit(node)


def imports(module: Module, known: frozenset[str]) -> list[Import]:
    visitor = _Imports(module, known)
    visitor.visit(module.tree)
    return visitor.found


# The rules --------------------------------------------------------------------------------------------


def violations(root: Path) -> list[str]:
    """Every place in the tree at *root* that breaks a rule, as `module:line: what is wrong`."""
    tree = modules(root)
    known = frozenset(module.name for module in tree)
    return [wrong for module in tree for wrong in _violations(module, known)]


def _violations(module: Module, known: frozenset[str]) -> Iterator[str]:
    if module.layer and module.layer != FREE and module.layer not in RANK:
        yield f"{module.name}:1: {module.layer} has no place among the layers"
        return
    for found in imports(module, known):
        where = f"{module.name}:{found.line}"
        top, _, rest = found.target.partition(".")
        if top == PACKAGE:
            wrong = _direction(module.layer, rest.partition(".")[0], found, known)
            if wrong:
                yield f"{where}: {wrong}"
        elif top in UNIX_ONLY and not found.lazy and not found.for_types:
            yield f"{where}: {top} exists on Unix only; import it where it is needed"
        if module.layer in PURE and top in IMPURE_MODULES:
            yield f"{where}: {module.layer} is pure and must not know {top}"
    if module.layer in PURE:
        yield from _impure_calls(module)
    if module.lines > MOST_LINES and EXCUSE not in (ast.get_docstring(module.tree) or ""):
        yield (
            f"{module.name}:1: {module.lines} lines; split it, or add a sentence"
            f" that begins with {EXCUSE!r} to its docstring"
        )


def _direction(importer: str, imported: str, found: Import, known: frozenset[str]) -> str | None:
    """What is wrong with *importer* importing from *imported*; the empty name is that of the public face."""
    needed_later = found.lazy or found.for_types
    if importer == FREE or imported == importer or not imported:
        return None
    if imported == FREE:
        return f"nothing but {FREE} imports {FREE}"
    if not importer:
        early = RANK.get(imported, len(LAYERS)) > RANK["ports"] and not needed_later
        return f"the public face imports {imported} before it is needed" if early else None
    if f"{PACKAGE}.{imported}" not in known:
        return None if importer in FACE_USERS else f"{importer} imports {imported} from the public face"
    if RANK.get(imported, len(LAYERS)) >= RANK[importer]:
        return f"{importer} imports {imported}, which is not below it"
    if imported in ONLY_WHEN_NEEDED.get(importer, ()) and not needed_later:
        return f"{importer} imports {imported} before it is needed"
    return None


def _impure_calls(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id in IMPURE_CALLS:
            yield f"{module.name}:{node.lineno}: {module.layer} is pure and must not call {node.func.id}"
        elif isinstance(node.func, ast.Attribute) and node.func.attr in IMPURE_METHODS:
            yield f"{module.name}:{node.lineno}: {module.layer} is pure and must not ask for the time"


def test_the_source_keeps_its_architecture() -> None:
    found = violations(SOURCE)
    assert not found, "\n".join(found)


def test_every_module_is_read() -> None:
    names = {module.name for module in modules(SOURCE)}
    assert {"zeoid", "zeoid.model", "zeoid.wire", "zeoid.wire.connection", "zeoid.server.session"} <= names
    assert all(module.tree.body for module in modules(SOURCE) if not module.is_package)


BLOCKING = """
import builtins, importlib, sys

blocked, names = set(sys.argv[1].split()), sys.argv[2:]
package = names[0]
real, found = builtins.__import__, []

def guarded(name, globals=None, locals=None, fromlist=(), level=0):
    importer = (globals or {}).get("__name__") or ""
    if importer.partition(".")[0] == package and not level and name.partition(".")[0] in blocked:
        found.append(f"{importer} imports {name}")
        raise ImportError(found[-1])
    return real(name, globals, locals, fromlist, level)

builtins.__import__ = guarded
for name in names:
    try:
        importlib.import_module(name)
    except BaseException as problem:
        found.append(f"{name}: {type(problem).__name__}: {problem}")
print("\\n".join(dict.fromkeys(found)), end="")
"""


def import_without_unix(root: Path) -> list[str]:
    """What goes wrong when every module at *root* is imported on a system without what only Unix has."""
    # Only the package's own imports are refused: here the standard library itself needs some of them.
    names = [module.name for module in modules(root) if module.layer != "__main__"]
    done = subprocess.run(
        [sys.executable, "-c", BLOCKING, " ".join(sorted(UNIX_ONLY)), *names],
        env={"PYTHONPATH": str(root), "PATH": "", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_every_module_can_be_imported_without_what_only_unix_has() -> None:
    found = import_without_unix(SOURCE)
    assert not found, "\n".join(found)


# The rules themselves, on made-up trees ---------------------------------------------------------------


class Tree:
    """A package below a folder, made of the texts of its modules."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("", "model", "errors", "limits", "wire", "server", "client", "config", "cli", "testing"):
            self.add(f"{name}/__init__.py" if name else "__init__.py", "")

    def add(self, path: str, text: str) -> None:
        file = self.root / PACKAGE / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_an_empty_tree_breaks_no_rule(tree: Tree) -> None:
    assert violations(tree.root) == []


ALLOWED = [
    ("wire/codec.py", "from zeoid import limits"),
    ("wire/codec.py", "from zeoid.wire import frames"),
    ("wire/codec.py", "from . import frames"),
    ("wire/codec.py", "from ..model import Oid"),
    ("wire/codec.py", "import zeoid.errors"),
    ("wire/codec.py", "from zeoid import __version__"),
    ("server/session.py", "from zeoid.wire.codec import Codec"),
    ("server/session.py", "import asyncio, time"),
    ("server/session.py", "def f():\n    import uvloop"),
    ("cli/serve.py", "from zeoid.server import x"),
    ("cli/serve.py", "from zeoid import ClientStorage"),
    ("__main__.py", "from zeoid.cli import main"),
    ("config/component.py", "def open():\n    from zeoid.client import Storage"),
    (
        "config/component.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from zeoid.client import S",
    ),
    ("testing/network.py", "from zeoid.cli import x\nfrom zeoid.server import y\nimport zeoid"),
    ("testing/network.py", "from zeoid import testing"),
    ("__init__.py", "def __getattr__(name):\n    from zeoid.client import S\n    return S"),
    ("__init__.py", "from zeoid.errors import ZeoidError"),
    ("__init__.py", "import typing\nif typing.TYPE_CHECKING:\n    from zeoid.client import S"),
]

FORBIDDEN = [
    # Upwards and sideways, wherever the import stands.
    ("model.py", "from zeoid import limits", "zeoid.model:1: model imports limits, which is not below it"),
    (
        "wire/codec.py",
        "from zeoid.server import x",
        "zeoid.wire.codec:1: wire imports server, which is not below it",
    ),
    ("wire/codec.py", "import zeoid.cli", "wire imports cli"),
    ("wire/codec.py", "from ..server import x", "wire imports server"),
    ("wire/__init__.py", "from .. import server", "wire imports server"),
    (
        "wire/codec.py",
        "x = 1\ndef f():\n    from zeoid import server",
        "zeoid.wire.codec:3: wire imports server",
    ),
    ("wire/codec.py", "if TYPE_CHECKING:\n    from zeoid.client import S", "wire imports client"),
    ("wire/codec.py", "try:\n    import zeoid.client\nexcept ImportError:\n    pass", "wire imports client"),
    ("wire/codec.py", "class C:\n    from zeoid.client import S", "wire imports client"),
    ("wire/codec.py", "import importlib\nimportlib.import_module('zeoid.cli')", "wire imports cli"),
    ("server/x.py", "from zeoid.client.storage import S", "server imports client, which is not below it"),
    ("client/x.py", "async def f():\n    from zeoid.server import S", "client imports server"),
    ("commit/x.py", "from zeoid.wire import codec", "commit imports wire"),
    ("engines/x.py", "import zeoid.config", "engines imports config"),
    ("cli/x.py", "from zeoid import testing", "nothing but testing imports testing"),
    ("__init__.py", "def f():\n    import zeoid.testing.network", "nothing but testing imports testing"),
    (
        "__init__.py",
        "from zeoid.client import ClientStorage",
        "the public face imports client before it is needed",
    ),
    ("server/x.py", "from zeoid import ClientStorage", "server imports ClientStorage from the public face"),
    ("server/x.py", "import zeoid", "server imports * from the public face"),
    ("server/x.py", "from zeoid import *", "server imports * from the public face"),
    ("config/x.py", "from zeoid.server import x", "config imports server before it is needed"),
    ("config/x.py", "def f():\n    from zeoid.cli import x", "config imports cli, which is not below it"),
    ("tools.py", "", "zeoid.tools:1: tools has no place among the layers"),
    ("common/x.py", "", "common has no place among the layers"),
    # Purity.
    ("wire/x.py", "import socket", "zeoid.wire.x:1: wire is pure and must not know socket"),
    ("wire/x.py", "from os import path", "wire is pure and must not know os"),
    ("wire/x.py", "def f():\n    import concurrent.futures", "wire is pure and must not know concurrent"),
    ("wire/x.py", "if TYPE_CHECKING:\n    import asyncio", "wire is pure and must not know asyncio"),
    ("wire/x.py", "__import__('time')", "wire is pure and must not know time"),
    ("commit/x.py", "import logging", "commit is pure and must not know logging"),
    ("commit/x.py", "import random", "commit is pure and must not know random"),
    ("commit/x.py", "open('x')", "commit is pure and must not call open"),
    (
        "commit/x.py",
        "import datetime\ndatetime.datetime.now()",
        "zeoid.commit.x:2: commit is pure and must not ask",
    ),
    # What only Unix has.
    ("server/x.py", "import fcntl", "zeoid.server.x:1: fcntl exists on Unix only"),
    (
        "server/x.py",
        "try:\n    import uvloop\nexcept ImportError:\n    uvloop = None",
        "uvloop exists on Unix only",
    ),
    (
        "server/x.py",
        "import sys\nif sys.platform != 'win32':\n    from pwd import getpwnam",
        "pwd exists on Unix only",
    ),
    ("__init__.py", "class C:\n    import resource", "resource exists on Unix only"),
    # Length.
    ("server/x.py", "pass\n" * 451, "zeoid.server.x:1: 451 lines; split it"),
]


@pytest.mark.parametrize(("path", "text"), ALLOWED, ids=lambda part: part.replace("\n", "; "))
def test_what_is_allowed(tree: Tree, path: str, text: str) -> None:
    tree.add("wire/frames.py", "")
    tree.add(path, text)
    assert violations(tree.root) == []


@pytest.mark.parametrize(("path", "text", "wrong"), FORBIDDEN, ids=[wrong for *_, wrong in FORBIDDEN])
def test_what_is_forbidden_is_found(tree: Tree, path: str, text: str, wrong: str) -> None:
    tree.add(path, text)
    assert [wrong in found for found in violations(tree.root)] == [True]


def test_a_long_module_may_say_why(tree: Tree) -> None:
    tree.add("server/x.py", '"""What it owns.\n\nLong because it is one table.\n"""\n' + "pass\n" * 500)
    tree.add("server/y.py", "pass\n" * 450)
    assert violations(tree.root) == []


def test_every_layer_but_the_two_ends_is_bounded_both_ways(tree: Tree) -> None:
    for names in LAYERS:
        for name in names:
            tree.add(f"{name}/__init__.py" if name != "__main__" else "__main__.py", "")
    ranked = [(rank, name) for name, rank in RANK.items() if name != "__main__"]
    for rank, importer in ranked:
        for other, imported in ranked:
            tree.add(f"{importer}/probe.py", f"def f():\n    import zeoid.{imported}.x")
            expected = importer != imported and other >= rank
            assert bool(violations(tree.root)) is expected, (importer, imported)
        tree.add(f"{importer}/probe.py", "")


def test_an_import_that_needs_unix_is_found_where_it_happens(tree: Tree) -> None:
    tree.add("server/x.py", "def f():\n    import fcntl\nimport threading, subprocess, asyncio\n")
    assert import_without_unix(tree.root) == []
    tree.add("server/x.py", "def f():\n    import fcntl\nf()\n")
    assert import_without_unix(tree.root) == [
        "zeoid.server.x imports fcntl",
        "zeoid.server.x: ImportError: zeoid.server.x imports fcntl",
    ]
    tree.add("server/x.py", "try:\n    from resource import getrlimit\nexcept ImportError:\n    pass\n")
    assert import_without_unix(tree.root) == ["zeoid.server.x imports resource"]
    tree.add("server/x.py", "1 / 0\n")
    assert import_without_unix(tree.root) == ["zeoid.server.x: ZeroDivisionError: division by zero"]
