"""What the demo shows: each Zope writes once, and the others see it.

Owns the proof that the Zopes agree. Must not know how they are started.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from demo.processes import DemoError
from demo.zope import Zope

PAGE = "greeting"
AGREE_TIMEOUT_S = 10.0
POLL_INTERVAL_S = 0.002


@dataclass(frozen=True)
class Writing:
    """One write through one Zope.

    `delays_s`: when each of the others showed it, in seconds after the writer's answer.
    """

    writer: str
    deed: str
    text: str
    delays_s: dict[str, float]


def write_in_turn(zopes: Sequence[Zope]) -> Iterator[Writing]:
    """The first Zope creates the page, the others change it; raise DemoError when they do not agree."""
    before: str | None = None
    for writer in zopes:
        # Every Zope has the old state in its caches now, and must learn that it is out of date.
        for zope in zopes:
            wait_until_read(zope, before)
        text = f"Hello from {writer.name}."
        if before is None:
            writer.create(PAGE, text)
        else:
            writer.change(PAGE, text)
        written = time.monotonic()
        others = (zope for zope in zopes if zope is not writer)
        delays_s = {zope.name: wait_until_read(zope, text) - written for zope in others}
        yield Writing(writer.name, "created" if before is None else "changed", text, delays_s)
        before = text
    for zope in zopes:
        wait_until_read(zope, before)


def wait_until_read(zope: Zope, expected: str | None) -> float:
    """Return the time at which this Zope showed the expected text."""
    deadline = time.monotonic() + AGREE_TIMEOUT_S
    while (text := zope.read(PAGE)) != expected:
        if time.monotonic() > deadline:
            raise DemoError(
                f"The Zopes do not agree: for {AGREE_TIMEOUT_S:.0f} s {zope.name} has been showing"
                f" {described(text)} at /{PAGE}, and not {described(expected)}."
            )
        time.sleep(POLL_INTERVAL_S)
    return time.monotonic()


def described(text: str | None) -> str:
    return "no page" if text is None else f'"{text}"'
