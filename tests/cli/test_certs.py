"""`zeoid certs`: what it says, what it makes, and that other verbs don't pay for it."""

from __future__ import annotations

import json
import shlex
import ssl
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.peers import environment
from zeoid.cli import main, parser
from zeoid.security import files
from zeoid.security.certificates import CertificateAuthority

Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `zeoid certs` in a directory of its own; all that it prints."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, status: int = 0) -> str:
        assert main(["certs", *arguments]) == status
        output = capsys.readouterr()
        return output.out if status == 0 else output.err

    return run


def test_from_nothing_to_bundles(run: Run, tmp_path: Path) -> None:
    said = run("init")
    assert all(f"made certs/{name}" in said for name in ("ca.pem", "ca-key.pem", "revoked.pem"))
    said = run("server", "zoo", "zoo.example.org", "10.0.0.7", "--local", "--days", "30")
    assert "made certs/servers/zoo.pem, for zoo.example.org, 10.0.0.7, localhost, 127.0.0.1, ::1, " in said
    assert "made certs/clients/app1.pem, with the role write, valid until" in run("client", "app1")
    assert "with the role admin" in run("client", "boss", "--role", "admin")
    assert "for tier, also a client with the role replica" in run(
        "server", "tier", "--also-client", "--role", "replica"
    )
    for bundle in ("servers/zoo", "servers/tier", "clients/app1", "clients/boss"):
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(tmp_path / "certs" / f"{bundle}.pem")


@pytest.mark.parametrize("host", ["zoo.example.org", "not_*_a_name", "x" * 65])
def test_the_next_steps_are_commands_that_work(run: Run, monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: host)
    said = run("init", "--directory", "our certs")
    steps = [shlex.split(line) for line in said.splitlines() if line.startswith("  ")]
    assert [step[:2] for step in steps] == [["zeoid", "certs"], ["zeoid", "certs"], ["zeoid", "serve"]]
    for step in steps[:2]:
        run(*step[2:])
    for option in ("--tls", "--tls-revoked"):
        assert Path(steps[2][steps[2].index(option) + 1]).is_file()


def test_renewing_tells_of_the_former_one(run: Run) -> None:
    run("init", "--directory", "c")
    run("client", "app1", "--directory", "c")
    assert "--renew makes a new one" in run("client", "app1", "--directory", "c", status=2)
    said = run("client", "app1", "--directory", "c", "--renew")
    assert "the former one stays valid until" in said
    run(*shlex.split(said.splitlines()[-1])[2:])
    assert [entry["state"] for entry in listed(run, "c")] == ["revoked", "valid"]


def listed(run: Run, directory: str = "certs") -> list[dict[str, object]]:
    issued: list[dict[str, object]] = json.loads(run("list", "--json", "--directory", directory))["issued"]
    return issued


def test_revoking(run: Run) -> None:
    run("init")
    run("client", "app1")
    said = run("revoke", "app1")
    (entry,) = listed(run)
    assert f"revoked client app1, serial {entry['serial']}" in said
    assert "made certs/revoked.pem: copy it to where each server's --tls-revoked points" in said
    assert entry["state"] == "revoked"
    assert "has no valid certificate" in run("revoke", "app1", status=2)


@pytest.mark.parametrize("arguments", [(), ("app1", "--serial", "12")])
def test_what_to_revoke_is_a_name_or_a_number(
    run: Run, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run("revoke", *arguments)
    assert caught.value.code == 2
    assert "usage: zeoid certs revoke" in capsys.readouterr().err


def test_the_table(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run("init")
    assert "nothing was issued yet" in run("list")
    run("server", "zoo", "a", "10.0.0.7")
    run("client", "late", "--days", "3", "--role", "read")
    run("client", "gone")
    run("revoke", "gone")
    past = CertificateAuthority(Path("certs"), lambda: 1_700_000_000.0)
    past.issue_client("old")
    rows = [line.split("  ") for line in run("list").splitlines()]
    cells = {row[0]: [cell.strip() for cell in row if cell.strip()] for row in rows}
    assert cells["NAME"] == ["NAME", "KIND", "ROLE", "HOSTS", "VALID UNTIL", "STATE", "SERIAL"]
    assert cells["zoo"][1:4] == ["server", "-", "a,10.0.0.7"]
    assert cells["zoo"][5] == "valid"
    assert cells["late"][1:4] == ["client", "read", "-"]
    assert cells["late"][5] in ("EXPIRES in 2 days", "EXPIRES in 3 days")
    assert cells["gone"][5].startswith("revoked 20")
    assert cells["old"][5] == "EXPIRED"
    assert "the authority certs/ca.pem: valid until" in run("list")


def test_the_list_for_programs(run: Run) -> None:
    run("init")
    run("server", "zoo", "a")
    said = json.loads(run("list", "--json"))
    assert said["authority"]["state"] == "valid"
    (entry,) = said["issued"]
    assert (entry["name"], entry["kind"], entry["hosts"]) == ("zoo", "server", ["a"])


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("client", "app1"), "no certificate authority in certs; `zeoid certs init` makes one"),
        (("list",), "no certificate authority in certs"),
        (("revoke", "app1"), "no certificate authority in certs"),
        (("client", "../app1"), "'../app1' can't be a certificate's name"),
    ],
)
def test_one_line_for_what_is_wrong(run: Run, arguments: tuple[str, ...], why: str) -> None:
    said = run(*arguments, status=2)
    assert said.startswith("zeoid: ")
    assert why in said
    assert said.count("\n") == 1
    assert not list(Path().iterdir())


def test_a_failure_of_the_disk_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(files.os, "replace", replace)
    assert run("init", status=2) == "zeoid: certs/ca-key.pem: No space left on device\n"


def test_other_verbs_do_not_load_what_this_one_needs() -> None:
    script = (
        "import sys, zeoid.cli; zeoid.cli.parser();"
        "print(*(name for name in sys.modules if name.partition('.')[0] == 'cryptography'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.strip() == ""


def test_every_action_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for action in ("init", "server", "client", "list", "revoke"):
        with pytest.raises(SystemExit) as caught:
            parser().parse_args(["certs", action, "--help"])
        assert caught.value.code == 0
        assert f"usage: zeoid certs {action}" in capsys.readouterr().out
