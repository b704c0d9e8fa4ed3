"""Packages of a Debian release, downloaded and unpacked into a folder; nothing is installed.

They come from the Debian mirror that this machine's apt knows, for any architecture.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

__all__ = ["NotToBeHad", "unpack"]


class NotToBeHad(Exception):
    """Packages that could not be fetched; the message says why."""


def unpack(
    names: Sequence[str],
    root: Path,
    *,
    suite: str = "testing",
    architecture: str | None = None,
    dependencies: bool = False,
) -> None:
    """Unpack the packages `names` of the release `suite` into the new folder `root`.

    With `dependencies`, all that they depend on as well.  `architecture` in Debian's word (``arm64``), by default this
    machine's.  Raises NotToBeHad.
    """
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=root.parent) as name:
        tmp = Path(name)
        packages = tmp / "archives"
        for folder in ("lists/partial", "archives/partial", "root/usr/bin", "root/usr/lib", "root/usr/sbin"):
            (tmp / folder).mkdir(parents=True)
        for folder in ("bin", "lib", "sbin", "lib64"):  # links, as in every Debian, or packages would make folders
            if folder == "lib64":
                (tmp / "root/usr/lib64").mkdir()
            (tmp / "root" / folder).symlink_to(f"usr/{folder}")
        (tmp / "status").touch()
        (tmp / "sources.list").write_text(f"deb {_mirror()} {suite} main\n")
        apt = ["apt-get", "-qq", "-o", f"Dir::State={tmp}", "-o", f"Dir::State::lists={tmp}/lists",
               "-o", f"Dir::State::status={tmp}/status", "-o", f"Dir::Cache={tmp}",
               "-o", f"Dir::Cache::archives={packages}", "-o", f"Dir::Etc::sourcelist={tmp}/sources.list",
               "-o", "Dir::Etc::sourceparts=-", "-o", "APT::Sandbox::User=root",
               "-o", "Debug::NoLocking=1"]  # fmt: skip
        if architecture is not None:
            apt += ["-o", f"APT::Architecture={architecture}", "-o", f"APT::Architectures={architecture}"]
        _must([*apt, "update"])
        if dependencies:
            _must([*apt, "-y", "--download-only", "--no-install-recommends", "install", *names])
        else:
            _must([*apt, "download", *names], cwd=packages)
        for package in sorted(packages.glob("*.deb")):
            _must(["dpkg", "-x", str(package), str(tmp / "root")])
        (tmp / "root").rename(root)


def _mirror() -> str:
    try:
        indexes = _must(["apt-get", "indextargets", "--format", "$(SITE)", "Identifier: Packages"]).split()
    except OSError as error:
        raise NotToBeHad(f"this machine has no apt: {error}") from error
    for index in indexes:
        if index.endswith("/debian"):
            return index
    raise NotToBeHad("apt knows no Debian mirror here")


def _must(command: Sequence[str], cwd: Path | None = None) -> str:
    done = subprocess.run(
        command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode != 0:
        raise NotToBeHad(f"failed: {' '.join(command[:1] + list(command[-3:]))}\n{done.stdout[-1500:]}")
    return done.stdout
