"""Exceptions on the wire: how an error becomes a reply, and a reply an error again.

Owns the list of errors that cross by name. What is not on it arrives as ServerError, with its name in the
message; no class is ever looked up by a name that came from the network.
"""

from collections.abc import Callable
from typing import Any, Final

from ZODB import POSException

from zeoid.errors import Forbidden, InvalidCall, ServerError, UnsendableValue
from zeoid.wire.pickles import Instance

#: The class's dotted name, and its constructor arguments or its attributes.
Fault = tuple[str, Any]


def describe(problem: BaseException) -> Fault:
    """*problem* as (dotted class name, attributes or arguments), in plain values."""
    if isinstance(problem, (InvalidCall, UnsendableValue)):
        # Stock clients know TypeError, and not ours.
        return "builtins.TypeError", (str(problem),)
    if isinstance(problem, Forbidden):
        # Stock clients make a ServerException, a StorageError, of any name that they don't know.
        return _FORBIDDEN, (str(problem),)
    kind = type(problem)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if isinstance(problem, POSException.MultipleUndoErrors):
        pairs = [(oid, str(getattr(error, "_reason", error))) for oid, error in problem._errs]
        return name, {"_errs": pairs}
    attributes = {key: value for key, value in vars(problem).items() if key != "__notes__"}
    if isinstance(problem, POSException.POSError) and kind.__module__.partition(".")[0] != "ZODB":
        return _describe_kin(problem, attributes)
    details = attributes or problem.args
    return name, details if _is_plain(details) else (str(problem),)


def _describe_kin(problem: POSException.POSError, attributes: dict[str, Any]) -> Fault:
    """An error that another package derived from one of ZODB's, as that one: clients know no other."""
    names = (f"{kind.__module__}.{kind.__qualname__}" for kind in type(problem).__mro__)
    name = next((name for name in names if name in _REBUILD), "ZODB.POSException.StorageError")
    known = {key: value for key, value in attributes.items() if key in _ATTRIBUTES and _is_plain(value)}
    if known:
        return name, known
    return name, tuple(part for part in problem.args if _is_plain(part)) or (str(problem),)


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(part) for part in value.values())
    if isinstance(value, (tuple, list)):
        return all(_is_plain(part) for part in value)
    return value is None or type(value) in (str, bytes, int, float, bool)


def rebuild(args: Any) -> Exception:
    """The exception that a fault reply describes."""
    if type(args) not in (tuple, list) or len(args) != 2 or type(args[0]) is not str:
        return ServerError("the server reported an error in an unknown form")
    name, details = args
    make = _REBUILD.get(name)
    if make is not None:
        try:
            problem = make(details)
            str(problem)  # whoever logs it must not be the one who finds out that it can't be told
            return problem
        except (KeyError, TypeError, IndexError, ValueError, AttributeError, RecursionError):
            pass
    return ServerError(f"{name}: {_told(details)}")


def _told(details: Any) -> str:
    if isinstance(details, (tuple, list)):
        return ", ".join(str(part) for part in details)
    if isinstance(details, dict):
        told = (f"{str(key).lstrip('_')}={value!r}" for key, value in details.items())
        return ", ".join(sorted(told))
    return str(details)


def _with_args(kind: type[Exception]) -> Callable[[Any], Exception]:
    def make(details: Any) -> Exception:
        return kind(*details) if isinstance(details, (tuple, list)) else kind(_told(details))

    return make


def _conflict(kind: type[POSException.ConflictError]) -> Callable[[Any], Exception]:
    def make(details: Any) -> Any:
        serials = details["serials"]
        problem = kind(
            message=details["message"],
            oid=details["oid"],
            serials=None if serials is None else tuple(serials),
        )
        problem.class_name = details.get("class_name")
        return problem

    return make


def _btrees_conflict(details: Any) -> Any:
    return POSException.BTreesConflictError(
        p1=details["p1"], p2=details["p2"], p3=details["p3"], reason=details["reason"]
    )


def _undo(details: Any) -> Any:
    if isinstance(details, dict):
        return POSException.UndoError(details["_reason"], details.get("_oid"))
    return POSException.UndoError(*details)


def _undo_errors(details: Any) -> Any:
    return POSException.MultipleUndoErrors([(oid, _reason(error)) for oid, error in details["_errs"]])


def _reason(error: Any) -> str:
    if isinstance(error, Instance):
        return str(error.state.get("_reason") or ", ".join(map(str, error.args)))
    if isinstance(error, (tuple, list)) and len(error) == 2 and isinstance(error[1], dict):
        return str(error[1].get("_reason"))
    return str(error)


_FORBIDDEN: Final = "zeoid.errors.Forbidden"
#: What conflicts and failed undos know of themselves.
_ATTRIBUTES: Final = frozenset({"class_name", "message", "oid", "serials", "_oid", "_reason"})

_REBUILD: Final[dict[str, Callable[[Any], Exception]]] = {
    "builtins.KeyError": _with_args(KeyError),
    "builtins.TypeError": _with_args(TypeError),
    "builtins.ValueError": _with_args(ValueError),
    "ZODB.POSException.BTreesConflictError": _btrees_conflict,
    "ZODB.POSException.ConflictError": _conflict(POSException.ConflictError),
    "ZODB.POSException.ReadConflictError": _conflict(POSException.ReadConflictError),
    "ZODB.POSException.MultipleUndoErrors": _undo_errors,
    "ZODB.POSException.UndoError": _undo,
    "ZODB.POSException.POSKeyError": _with_args(POSException.POSKeyError),
    "ZODB.POSException.ReadOnlyError": _with_args(POSException.ReadOnlyError),
    "ZODB.POSException.StorageError": _with_args(POSException.StorageError),
    "ZODB.POSException.StorageTransactionError": _with_args(POSException.StorageTransactionError),
    "ZODB.POSException.Unsupported": _with_args(POSException.Unsupported),
    _FORBIDDEN: _with_args(Forbidden),
}
