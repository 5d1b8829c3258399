"""What the documentation lists is what there is: options, keys, arguments, limits, links."""

import argparse
import inspect
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from zeoid import limits
from zeoid.cli import parser
from zeoid.client.storage import ClientStorage
from zeoid.config import serving
from zeoid.retrying import Options, Retry

ROOT = Path(__file__).parent.parent
REFERENCE = (ROOT / "docs" / "reference.md").read_text()


def section(title: str) -> str:
    """The text below a heading of the reference, up to the next one."""
    return re.split(r"^## ", REFERENCE, flags=re.MULTILINE)[
        [part.partition("\n")[0] for part in re.split(r"^## ", REFERENCE, flags=re.MULTILINE)].index(title)
    ]


def first_cells(text: str) -> set[str]:
    """Every code span in the first cell of every row of a section's tables."""
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    return {span for row in rows for span in re.findall(r"`([^`]+)`", row.split("|")[1])}


def verbs() -> dict[str, argparse.ArgumentParser]:
    (action,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


def test_every_verb_has_a_section() -> None:
    assert {f"zeoid {name}" for name in verbs()} <= set(re.findall(r"^## (.*)$", REFERENCE, re.MULTILINE))


def options(verb: argparse.ArgumentParser) -> set[str]:
    """What a verb takes, and what its actions are called and take."""
    found = set()
    for action in verb._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= set(action.choices).union(*map(options, action.choices.values()))
        elif action.option_strings:
            found |= {
                f"{name} {action.metavar}" if action.metavar else name for name in action.option_strings
            }
        else:
            found.add(str(action.metavar))
    return found


@pytest.mark.parametrize("verb", sorted(verbs()))
def test_every_option_of_a_verb_is_documented_and_no_other(verb: str) -> None:
    assert first_cells(section(f"zeoid {verb}")) == options(verbs()[verb])


def test_every_key_of_a_configuration_file_is_documented_and_no_other() -> None:
    schema = serving._schema()
    keys = {key for name in ("zeo", "ssl") for key, _ in schema.gettype(name) if key is not None}
    assert first_cells(section("Configuration file")) == keys


def test_every_key_of_a_client_in_a_configuration_file_is_documented_and_no_other() -> None:
    component = ElementTree.parse(ROOT / "src" / "zeoid" / "component.xml")
    keys = [*component.iter("key"), *component.iter("multikey")]
    assert first_cells(section("Section zeoid")) == {str(key.get("name")) for key in keys}


def test_every_argument_of_a_client_is_documented_and_no_other() -> None:
    arguments = set(inspect.signature(ClientStorage.__init__).parameters) - {"self"}
    assert first_cells(section("ClientStorage")) == arguments
    docstring = inspect.getdoc(ClientStorage) or ""
    assert all(re.search(rf"^{name}[:,]", docstring, re.MULTILINE) for name in arguments)


def test_every_argument_of_retry_is_documented_and_no_other() -> None:
    arguments = set(inspect.signature(Retry).parameters)
    assert first_cells(section("zeoid.retry")) == arguments == set(Options.__annotations__)
    docstring = inspect.getdoc(Retry) or ""
    explained = re.findall(r"^([a-z][a-z_, ]+):", docstring, re.MULTILINE)
    assert arguments == {name for names in explained for name in names.split(", ")}


def test_every_limit_is_documented_with_its_value() -> None:
    page = (ROOT / "docs" / "limits.md").read_text()
    documented = dict(re.findall(r"^\| `([A-Z_]+)` \| ([\d_.]+) \|", page, re.MULTILINE))
    actual = {name: value for name, value in vars(limits).items() if name.isupper()}
    assert {name: float(value) for name, value in documented.items()} == actual


@pytest.mark.parametrize(
    "page", sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("**/*.md") if ".venv" not in str(p))
)
def test_links_between_pages_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    targets = re.findall(r"\]\((?!https?://)([^)#]*)(?:#[^)]*)?\)", text)
    assert all((ROOT / page).parent.joinpath(target).exists() for target in targets if target)
