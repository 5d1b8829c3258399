"""`zeoid tokens`: made once, listed, revoked, and what is wrong said in a line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from zeoid.cli import main
from zeoid.security import tokens

Run = Callable[..., str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, status: int = 0) -> str:
        assert main(["tokens", *arguments]) == status
        output = capsys.readouterr()
        return output.out + output.err

    return run


def test_a_token_from_its_making_to_its_end(run: Run) -> None:
    options = ["--role", "read", "--storage", "1", "--storage", "a b", "--days", "90"]
    token = run("make", "reports", *options).strip()
    known = tokens.find(tokens.read(Path("tokens.json")), token)
    assert known is not None
    assert (known.role, known.storages) == ("read", ("1", "a b"))
    listed = run("list")
    assert listed.startswith("reports: read in 1, a b, made ")
    assert "good until 2" in listed
    assert token not in listed
    assert run("revoke", "reports") == "reports is revoked\n"
    assert "revoked 2" in run("list")


def test_the_defaults(run: Run) -> None:
    run("make", "a")
    assert "a: write in all storages" in run("list")
    assert "good until it is revoked" in run("list")


def test_another_file(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "mine"
    run("make", "a", "--file", str(path))
    assert "a: write" in run("list", "--file", str(path))
    assert not (tmp_path / "tokens.json").exists()


def test_one_that_has_expired(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run("make", "a", "--days", "0.000001")
    made = next(iter(tokens.read(Path("tokens.json")).values())).made
    monkeypatch.setattr("time.time", lambda: made + 1)
    assert ", expired " in run("list")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["make"], "which one? `zeoid tokens make NAME`"),
        (["revoke"], "which one?"),
        (["list"], "tokens.json can't be read: No such file"),
        (["list", "a"], "leave the name out"),
        (["revoke", "a", "--role", "read"], "are for `zeoid tokens make`"),
        (["make", "a b"], "can't be a name"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(run: Run, arguments: list[str], words: str) -> None:
    said = run(*arguments, status=2)
    assert said.startswith("zeoid: ")
    assert words in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("days", ["0", "-1", "nan", "inf", "x"])
def test_what_is_no_number_of_days(run: Run, days: str) -> None:
    with pytest.raises(SystemExit):
        run("make", "a", f"--days={days}")
