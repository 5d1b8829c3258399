"""Addresses as people write them, and what is none."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zeoid.addresses import TcpAddress, UnixAddress, parse_address, parse_addresses
from zeoid.errors import ConfigurationError

TCP = TcpAddress("zoo", 7700)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("zoo:7700", TCP),
        ("zoo.example.org:1", TcpAddress("zoo.example.org", 1)),
        ("127.0.0.1:65535", TcpAddress("127.0.0.1", 65535)),
        ("[::1]:8100", TcpAddress("::1", 8100)),
        ("[fe80::1%eth0]:8100", TcpAddress("fe80::1%eth0", 8100)),
        (":8100", TcpAddress("", 8100)),
        ("zoo:0", TcpAddress("zoo", 0)),
        ("/run/zeoid.sock", UnixAddress("/run/zeoid.sock")),
        ("./zeoid.sock", UnixAddress("./zeoid.sock")),
        ("var/zeo:1", UnixAddress("var/zeo:1")),
    ],
)
def test_one_address(text: str, address: Any) -> None:
    assert parse_address(text) == address
    assert parse_addresses(text) == (address,)


@pytest.mark.parametrize(
    "text",
    [
        "", ":", "zoo", "zoo:", "zoo:http", "zoo:-1", "zoo:65536", "zoo:1.5", "zoo: 1", "zoo:\u0661", "7700",
        "::1:8100", "fe80::1:8100", "[::1]", "[::1]8100", "zoo:1:2", "zoo:77_00", "zoo:+1",
    ],
)  # fmt: skip
def test_texts_that_are_no_address(text: str) -> None:
    with pytest.raises(ConfigurationError) as failure:
        parse_address(text)
    message = str(failure.value)
    assert repr(text) in message
    assert "\n" not in message, "one line, for a command line"


def test_an_ipv6_address_without_brackets_is_told_what_is_missing() -> None:
    with pytest.raises(ConfigurationError, match=r"in brackets, as in \[::1\]:8100"):
        parse_address("::1:8100")


@pytest.mark.parametrize(
    ("value", "addresses"),
    [
        (("zoo", 7700), (TCP,)),
        (("", 7700), (TcpAddress("127.0.0.1", 7700),)),
        (7700, (TcpAddress("127.0.0.1", 7700),)),
        ("zoo:7700", (TCP,)),
        ("a:1 b:2", (TcpAddress("a", 1), TcpAddress("b", 2))),
        ("a:1,b:2, c:3", (TcpAddress("a", 1), TcpAddress("b", 2), TcpAddress("c", 3))),
        (["a:1", ("b", 2), 3, "/s"], (
            TcpAddress("a", 1), TcpAddress("b", 2), TcpAddress("127.0.0.1", 3), UnixAddress("/s"),
        )),
        ((("a", 1), ("b", 2)), (TcpAddress("a", 1), TcpAddress("b", 2))),
        ((1, 2), (TcpAddress("127.0.0.1", 1), TcpAddress("127.0.0.1", 2))),
        (("a:1", "b:2"), (TcpAddress("a", 1), TcpAddress("b", 2))),
        (TCP, (TCP,)),
        ([TCP, UnixAddress("/s")], (TCP, UnixAddress("/s"))),
        (iter(["a:1"]), (TcpAddress("a", 1),)),
    ],
)  # fmt: skip
def test_what_a_client_takes(value: Any, addresses: Any) -> None:
    assert parse_addresses(value) == addresses


@pytest.mark.parametrize(
    "value",
    [
        None, True, False, 1.5, object(), [], (), "", "  ", ",", [[]], ["zoo"], ("zoo", "7700"),
        ("zoo", True), ("zoo",), ("zoo", 7700, 1.5), [("zoo", None)], {"zoo:x": 7700}, b"zoo:7700".hex(),
    ],
    ids=repr,
)  # fmt: skip
def test_what_a_client_does_not_take(value: Any) -> None:
    with pytest.raises(ConfigurationError):
        parse_addresses(value)


@pytest.mark.parametrize("port", [-1, 65536, 10**9])
def test_a_port_that_is_none(port: int) -> None:
    for value in (("zoo", port), port, [("zoo", port)], f"zoo:{port}"):
        with pytest.raises(ConfigurationError):
            parse_addresses(value)


@pytest.mark.parametrize("address", [TCP, TcpAddress("::1", 8100), UnixAddress("/run/zeoid.sock")])
def test_an_address_is_written_as_it_is_read(address: Any) -> None:
    assert parse_address(str(address)) == address


@settings(deadline=None, max_examples=200)
@given(st.text(st.sampled_from(":[]/.,1290aé \n"), max_size=12))
def test_any_text_is_an_address_or_refused(text: str) -> None:
    try:
        address = parse_address(text)
    except ConfigurationError:
        return
    assert parse_address(str(address)) == address
