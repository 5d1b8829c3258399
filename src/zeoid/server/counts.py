"""What a storage's server_status counts. Owns no behaviour."""

from dataclasses import dataclass


@dataclass(slots=True)
class Counts:
    """Since the start."""

    loads: int = 0
    stores: int = 0
    commits: int = 0
    aborts: int = 0
    conflicts: int = 0
    conflicts_resolved: int = 0
