"""ssh between the computers of a house: one throw-away key for every server, one for every user.

Nothing of the machine's own configuration is used: a house shows its computers another /etc/ssh, and an
/etc/shadow in which root is not locked, which sshd would mind.
"""

from __future__ import annotations

import shutil
import subprocess

from tests.network.house import House

CLIENT = """\
BatchMode yes
IdentityFile /etc/ssh/id
IdentitiesOnly yes
GlobalKnownHostsFile /etc/ssh/known_hosts
UserKnownHostsFile /dev/null
StrictHostKeyChecking yes
ExitOnForwardFailure yes
"""
SERVER = """\
HostKey /etc/ssh/host_key
AuthorizedKeysFile /etc/ssh/authorized_keys
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin yes
UsePAM no
PidFile none
Subsystem sftp internal-sftp
"""
# Of its own, because sshd wants a folder there that may not exist.
_RUN = 'mount -t tmpfs run /run && mkdir -m 755 /run/sshd && exec "$0" -D -e'


def give(house: House, *names: str) -> None:
    """Let root on these computers log in to each other, once servers run; the others have another key."""
    for key in ("host_key", "id", "strange_id"):
        path = str(house.folder / key)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", path], check=True)
    public = {key: (house.folder / f"{key}.pub").read_text() for key in ("host_key", "id")}
    for name in house.addresses:
        etc = house.etc(name)
        (etc / "shadow").write_text("root:*:19000:0:99999:7:::\n")
        (etc / "ssh").mkdir()
        shutil.copy(house.folder / "host_key", etc / "ssh")
        shutil.copy(house.folder / ("id" if name in names else "strange_id"), etc / "ssh" / "id")
        for file, content in (
            ("ssh_config", CLIENT), ("sshd_config", SERVER), ("authorized_keys", public["id"]),
            ("known_hosts", f"* {public['host_key']}"),
        ):  # fmt: skip
            (etc / "ssh" / file).write_text(content)


def serve(house: House, name: str) -> None:
    """Start a server there."""
    sshd = shutil.which("sshd", path=house.environment()["PATH"])
    assert sshd is not None
    house.wait_for(house.start(name, "sh", "-c", _RUN, sshd), r"Server listening on 0\.0\.0\.0 port 22\.")
