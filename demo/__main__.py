"""The demo's command line: what it prints, when it ends, and with which status.

Must not know how a server or a Zope is started, nor how it is asked.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from demo.processes import DemoError, Workspace
from demo.site import Site, start_site
from demo.tour import PAGE, write_in_turn
from demo.zope import ZopeVenv

ROOT = Path(__file__).resolve().parent.parent
WATCH_INTERVAL_S = 0.5


class Interrupted(BaseException):
    """A signal asked the demo to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    try:
        return run(options.check, ZopeVenv(options.zope_venv))
    except DemoError as error:
        print(f"\nThe demo failed. {error}", file=sys.stderr)
        return 1
    except Interrupted as interrupted:
        print(f"\nEnded early by {interrupted}.", file=sys.stderr)
        return 128 + interrupted.number
    except BrokenPipeError:
        # Nobody reads any more, as in `make demo | head`; the interpreter's last flush must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m demo",
        description="Start a Zeoid storage server and three Zopes that share it, write through each Zope,"
        " read through the others, and stay up until Ctrl-C. `make demo` prepares everything and runs this.",
    )
    parser.add_argument(
        "--check", action="store_true", help="do not stay up; exit with status 1 if the Zopes did not agree"
    )
    parser.add_argument(
        "--zope-venv",
        type=Path,
        metavar="FOLDER",
        default=os.environ.get("ZOPE_VENV") or ROOT / ".venv-zope",
        help="virtual environment with Zope and ZEO (default: $ZOPE_VENV, or else .venv-zope beside demo/)",
    )
    return parser.parse_args(arguments)


def interrupt(number: int, frame: FrameType | None) -> None:
    raise Interrupted(number)


def run(check: bool, venv: ZopeVenv) -> int:
    venv.check()
    print(
        "Zeoid: one storage server, three Zopes that share it.\n"
        f"Zope {venv.version('Zope')} with ZEO {venv.version('ZEO')}'s own client, unmodified.\n"
    )
    with Workspace() as workspace:
        row("Folder", f"{workspace.folder}  (removed at the end)")
        try:
            site = start_site(workspace, venv, row)
            print()
            show_writing(site)
            if check:
                conclude(workspace, site)
            else:
                stay_up(workspace, site)
        except DemoError:
            print(f"\n{workspace.tails()}", file=sys.stderr)
            raise
    return 0


def row(name: str, value: str) -> None:
    print(f"  {name:<14}  {value}")


def show_writing(site: Site) -> None:
    for writing in write_in_turn(site.zopes):
        seen = ", ".join(f"{name} after {delay_s * 1e3:.0f} ms" for name, delay_s in writing.delays_s.items())
        print(f'  {writing.writer} {writing.deed} /{PAGE}: "{writing.text}"  Seen by {seen}.')


def conclude(workspace: Workspace, site: Site) -> None:
    """Stop the server while the Zopes still run, the harder case, and see that it ends well."""
    (status,) = workspace.stop([site.server])
    if status != 0:
        how = "did not end and was killed" if status is None else f"ended with exit status {status}"
        raise DemoError(f"{site.server.name} was asked to end and {how}.")
    print("\nThe three Zopes agree.")


def stay_up(workspace: Workspace, site: Site) -> None:
    try:
        print(invitation(site, workspace.folder))
        while True:
            workspace.check_alive()
            time.sleep(WATCH_INTERVAL_S)
    except Interrupted:
        print("\nStopping.")


def invitation(site: Site, folder: Path) -> str:
    first, second, third = site.zopes
    user = site.user
    return f"""
  Log in as       {user.name} / {user.password}

Try it:
  Open {first.url}/{PAGE}/manage and {second.url}/{PAGE}/manage
  in two browser windows, save another text in one, and reload the other.
  Or without a browser:

  curl -s -o /dev/null -u {user.name}:{user.password} -d title= -d data=Hi {second.url}/{PAGE}/manage_edit
  curl {third.url}/{PAGE}

The configuration of a Zope is {folder}/zope1/zope.conf.
Ctrl-C ends everything and removes it."""


if __name__ == "__main__":
    sys.exit(main())
