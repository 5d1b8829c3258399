"""The names of roles, as certificates, tokens and access files have them. What a role allows is `roles`'."""

from enum import Enum
from typing import Final

#: What precedes the role in a certificate's subject, in its OU.
ROLE_PREFIX: Final = "zeoid role: "


class Role(Enum):
    """What somebody is to a server."""

    READ = "read"
    WRITE = "write"
    ADMIN = "admin"
    REPLICA = "replica"


ROLES: Final = tuple(role.value for role in Role)
