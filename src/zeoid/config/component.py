"""The section `<zeoid>` of ZConfig files, for zope.conf and whatever else opens ZODB storages from them.

Its keys are in `component.xml` of the package, where `%import zeoid` finds them. Owns how they become
arguments of a client storage.
"""

from typing import Any

from ZODB.config import BaseConfig

from zeoid.addresses import Address, parse_addresses
from zeoid.config.securing import read_token
from zeoid.errors import ConfigurationError

#: The keys that have other names than the arguments.
_ARGUMENTS = {"cache_size": "cache_size_bytes"}


def servers(text: str) -> tuple[Address, ...]:
    """The addresses in one line. A ValueError is told with file and line."""
    try:
        return parse_addresses(text)
    except ConfigurationError as problem:
        raise ValueError(str(problem)) from None


class ClientSection(BaseConfig):  # type: ignore[misc]
    """What ZODB opens."""

    def open(self, database_name: str = "unnamed", databases: Any = None) -> Any:
        """The client storage. ConfigurationError, or what its connection fails with."""
        from zeoid.client.storage import ClientStorage

        return ClientStorage(self.addresses(), **self.options())

    def addresses(self) -> list[Address]:
        return [address for line in self.config.server for address in line]

    def options(self) -> dict[str, Any]:
        """The arguments of the storage; those that no key was given for are left out."""
        options = {}
        for attribute in self.config.getSectionAttributes():
            value = getattr(self.config, attribute)
            if value is not None and attribute != "server":
                options[_ARGUMENTS.get(attribute, attribute)] = value
        file = options.pop("token_file", None)
        if file is not None:
            options["token"] = read_token(file)
        return options
