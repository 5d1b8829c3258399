"""The command itself: verbs, help, version, and one line for what has to be mended."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

import zeoid
from tests.server.processes import run
from zeoid import cli
from zeoid.cli import main, parser, serve
from zeoid.errors import ConfigurationError


def verb_that(does: BaseException | int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `serve` end like this."""

    def run(arguments: argparse.Namespace) -> int:
        if isinstance(does, BaseException):
            raise does
        return does

    monkeypatch.setattr(serve, "run", run)


@pytest.mark.parametrize("status", [0, 1])
def test_the_status_is_that_of_the_verb(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    verb_that(status, monkeypatch)
    assert main(["serve"]) == status


def test_what_has_to_be_mended_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    verb_that(ConfigurationError("the moon is full; wait a week"), monkeypatch)
    assert main(["serve"]) == 2
    assert capsys.readouterr() == ("", "zeoid: the moon is full; wait a week\n")


def test_an_interrupt_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    verb_that(KeyboardInterrupt(), monkeypatch)
    assert main(["serve"]) == 130
    assert capsys.readouterr() == ("", "")


def test_a_mistake_in_the_program_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    verb_that(ZeroDivisionError(), monkeypatch)
    with pytest.raises(ZeroDivisionError):
        main(["serve"])


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"zeoid {zeoid.__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["serve", "--help"]], ids=" ".join)
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("usage: zeoid")


@pytest.mark.parametrize(
    "arguments",
    [
        [], ["nosuch"], ["serve", "--nosuch"], ["serve", "a", "b"], ["serve", "-p"], ["serve", "-p", "http"],
        ["serve", "-p", "65536"], ["serve", "-p", "-1"], ["serve", "--transaction-timeout", "0"],
        ["serve", "--transaction-timeout", "soon"], ["serve", "--transaction-timeout", "nan"],
        ["serve", "--mem"],
    ],
    ids=lambda arguments: " ".join(arguments) or "nothing",
)  # fmt: skip
def test_a_command_line_that_is_wrong(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "zeoid" in capsys.readouterr().err


def test_h_is_the_host() -> None:
    """As ever with ZEO."""
    assert parser().parse_args(["serve", "-h", "zooserver"]).host == "zooserver"


def test_every_verb_says_what_it_does() -> None:
    for verb in cli._VERBS.values():
        assert verb.SUMMARY
        assert callable(verb.run)


def test_python_m_zeoid_is_the_command(tmp_path: Path) -> None:
    done = run("--version", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"zeoid {zeoid.__version__}\n", "")
