"""The security guide as something that can be carried out: its commands, whose they are, its files.

A command is a line `COMPUTER$ …` in a block of `console`; the contents of a file are a block whose first line
is `# COMPUTER: PATH`. Must not know how they are carried out.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "security.md"
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Command:
    computer: str
    line: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.line)


@dataclass(frozen=True)
class Chapter:
    """What stands below a heading, up to the next one of the same level."""

    text: str

    @property
    def commands(self) -> list[Command]:
        consoles = (block for language, block in self._blocks if language == "console")
        found = (re.fullmatch(r"(\w+)\$ (.*)", line) for block in consoles for line in block.split("\n"))
        return [Command(each[1], each[2]) for each in found if each]

    def commands_with(self, beginning: str) -> list[Command]:
        return [each for each in self.commands if each.line.startswith(beginning)]

    def command(self, beginning: str, computer: str = r"\w+") -> Command:
        """The only one that begins so."""
        found = [each for each in self.commands_with(beginning) if re.fullmatch(computer, each.computer)]
        (only,) = found
        return only

    def file(self, computer: str, path: str) -> str:
        """What is in it, by the guide."""
        head = f"# {computer}: {path}\n"
        (content,) = (block for _, block in self._blocks if block.startswith(head))
        return content

    @property
    def programs(self) -> list[str]:
        """The blocks of Python."""
        return [block for language, block in self._blocks if language == "python"]

    @property
    def _blocks(self) -> list[tuple[str, str]]:
        return _BLOCK.findall(self.text)


def chapter(title: str) -> Chapter:
    after = PAGE.read_text().partition(f"\n## {title}\n")[2]
    assert after, f"the guide has no chapter {title!r}"
    return Chapter(after.partition("\n## ")[0])
