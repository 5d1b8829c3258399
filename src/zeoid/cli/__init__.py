"""The command `zeoid`, one file per verb: a module with SUMMARY, add_arguments(parser) and run(parsed)."""

import argparse
import sys
from collections.abc import Sequence

from zeoid import __version__
from zeoid.cli import cache, certs, checkpoint, copy, journal, pack, recover, serve, tokens
from zeoid.errors import ConfigurationError

_VERBS = {
    "serve": serve,
    "copy": copy,
    "pack": pack,
    "checkpoint": checkpoint,
    "recover": recover,
    "journal": journal,
    "cache": cache,
    "certs": certs,
    "tokens": tokens,
}


def parser() -> argparse.ArgumentParser:
    """The whole command line. `-h` is a host, as in ZEO's handbook; help is `--help`."""
    top = argparse.ArgumentParser(
        prog="zeoid",
        description="Share one ZODB database among many processes.",
        add_help=False,
        allow_abbrev=False,
    )
    top.add_argument("--help", action="help", help="show this and exit")
    top.add_argument("--version", action="version", version=f"zeoid {__version__}")
    verbs = top.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, module in _VERBS.items():
        verb = verbs.add_parser(
            name,
            help=module.SUMMARY,
            description=module.SUMMARY[0].upper() + module.SUMMARY[1:] + ".",
            add_help=False,
            allow_abbrev=False,
        )
        verb.add_argument("--help", action="help", help="show this and exit")
        module.add_arguments(verb)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; the process's exit status. What the user must mend is said in one line."""
    parsed = parser().parse_args(arguments)
    try:
        status: int = _VERBS[parsed.verb].run(parsed)
    except ConfigurationError as problem:
        print(f"zeoid: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return status
