"""Write signed apt and dnf repositories of built packages.

    apt/pool/SUITE/*.deb     apt/dists/SUITE/{InRelease,Release,Release.gpg,main/binary-ARCH/Packages.gz}
    rpm/SUITE/MACHINE/*.rpm  rpm/SUITE/MACHINE/repodata/{repomd.xml,repomd.xml.asc,...}

Reproducible: all time stamps are the epoch, and so is that of the signatures if the key is older. Facts relied on:
Ed25519 and RSA (PKCS 1) signatures of the same data at the same time are equal; rpm runs the macro
%__gpg_sign_cmd to sign. Programs: apt-ftparchive (apt-utils), createrepo_c, gpg, rpmsign (rpm).
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path

from flavours import Package

TOOLS = ("apt-ftparchive", "createrepo_c", "gpg", "rpmsign")
USER_ID = re.compile(r"((?P<name>[^<>]+) <)?(?P<address>[^<>@\s]+@[^<>@\s]+)>?")
DEB_ARCHITECTURES = ("amd64", "arm64")


class ReleaseError(Exception):
    """A release cannot be made here; the text names what is missing."""


@dataclass(frozen=True)
class Signer:
    """The key of the caller's keyring that signs, and the time of the release (seconds since 1970)."""

    key: str
    epoch: int

    @functools.cached_property
    def time(self) -> int:
        """Return the time of the signatures: that of the release, or of a key that was made after it.

        gpg and apt refuse a signature that is older than its key.
        """
        made = [int(fields[5]) for fields in self._listing() if fields[0] in ("pub", "sub") and fields[5]]
        return max([self.epoch, *made])

    @property
    def is_rsa(self) -> bool:
        """Return whether every rpm can verify the signatures. Older ones refuse Ed25519 (rpm issue 1877)."""
        return all(fields[3] == "1" for fields in self._listing() if fields[0] in ("pub", "sub"))

    def _listing(self) -> list[list[str]]:
        """Return the records of the key (doc/DETAILS of GnuPG)."""
        listed = run(["gpg", "--batch", "--with-colons", "--list-keys", self.key]).decode()
        return [line.split(":") for line in listed.splitlines()]

    def command(self, *arguments: str) -> list[str]:
        return [
            "gpg", "--batch", "--yes", "--quiet", "--armor", "--digest-algo", "SHA512", "--local-user", self.key,
            "--faked-system-time", f"{self.time}!", *arguments,
        ]  # fmt: skip

    def detach(self, file: Path, signature: Path) -> None:
        """Write the armored signature of `file`."""
        run(self.command("--output", str(signature), "--detach-sign", str(file)))

    def clear(self, file: Path, signed: Path) -> None:
        """Write `file` with its signature around it."""
        run(self.command("--output", str(signed), "--clear-sign", str(file)))

    def public_key(self) -> bytes:
        found = run(["gpg", "--batch", "--armor", "--export", "--export-options", "export-minimal", self.key])
        if not found:
            raise ReleaseError(f"cannot find the key {self.key}: gpg has no such key; see gpg --list-secret-keys")
        return found

    def holder(self) -> str:
        """Return `NAME <ADDRESS>` of the first user ID of the key that has an address, or an empty string."""
        for fields in self._listing():
            if fields[0] == "uid" and (found := USER_ID.fullmatch(fields[9].replace("\\x3a", ":"))):
                return f"{found['name'] or found['address'].partition('@')[0]} <{found['address']}>"
        return ""

    def sign_rpm(self, file: Path) -> None:
        """Add the signature to the header of an rpm."""
        sign = " ".join([*self.command("--no-armor", "--output", "%{__signature_filename}", "--detach-sign"),
                         "%{__plaintext_filename}"])  # fmt: skip
        defines = [f"_gpg_name {self.key}", f"__gpg_sign_cmd {shutil.which('gpg')} {sign}"]
        run(["rpmsign", *(f"--define={one}" for one in defines), "--addsign", str(file)])


def run(command: list[str], cwd: Path | None = None) -> bytes:
    """Run a program and return its output. Raise ReleaseError with its errors if it fails."""
    done = subprocess.run(command, capture_output=True, check=False, cwd=cwd)
    if done.returncode:
        errors = done.stderr.decode(errors="replace")
        raise ReleaseError(f"cannot run {' '.join(command[:3])} ...: status {done.returncode}: {errors}")
    return done.stdout


def missing_tools() -> list[str]:
    return [tool for tool in TOOLS if not shutil.which(tool)]


def write_apt(files: Mapping[Package, Path], where: Path, maintainer: str, signer: Signer) -> None:
    """Write the apt repository: one suite for each distribution, named as the distribution names it."""
    for package, file in files.items():
        pool = where / "pool" / package.flavour.suite
        pool.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, pool)
    for suite in sorted({package.flavour.suite for package in files}):
        titles = {package.flavour.title for package in files if package.flavour.suite == suite}
        directory = where / "dists" / suite
        for architecture in DEB_ARCHITECTURES:
            index = directory / f"main/binary-{architecture}/Packages"
            index.parent.mkdir(parents=True)
            index.write_bytes(run(["apt-ftparchive", "--arch", architecture, "packages", f"pool/{suite}"], cwd=where))
            index.with_suffix(".gz").write_bytes(gzip.compress(index.read_bytes(), 9, mtime=0))
        release = directory / "Release"
        text = release_text(suite, f"cnprocd for {', '.join(titles)}", maintainer, directory, signer.epoch)
        release.write_text(text)
        signer.detach(release, directory / "Release.gpg")
        signer.clear(release, directory / "InRelease")


def release_text(suite: str, description: str, maintainer: str, directory: Path, epoch: int) -> str:
    """Return the Release file of a suite: its facts, and the sum and size of each index."""
    sums = "".join(
        f" {hashlib.sha256(path.read_bytes()).hexdigest()} {path.stat().st_size} {path.relative_to(directory)}\n"
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    )
    return (
        f"Origin: {maintainer}\nLabel: cnprocd\nSuite: {suite}\nCodename: {suite}\nDescription: {description}\n"
        f"Date: {formatdate(epoch, usegmt=True)}\nArchitectures: {' '.join(DEB_ARCHITECTURES)}\nComponents: main\n"
        f"SHA256:\n{sums}"
    )


def write_rpm(files: Mapping[Package, Path], where: Path, signer: Signer) -> None:
    """Write a dnf repository for each distribution and machine. `files` are signed already."""
    directories: dict[Path, list[Path]] = {}
    for package, file in files.items():
        machine = package.machine.replace("any", "noarch")
        directories.setdefault(where / package.flavour.suite / machine, []).append(file)
    for directory, found in directories.items():
        write_dnf(found, directory, signer)


def write_dnf(files: Iterable[Path], directory: Path, signer: Signer) -> None:
    directory.mkdir(parents=True)
    for file in files:
        os.utime(shutil.copy(file, directory), (signer.epoch, signer.epoch))  # the index has the file's time
    run([
        "createrepo_c", "--quiet", "--no-database", "--simple-md-filenames", "--revision", str(signer.epoch),
        "--set-timestamp-to-revision", "--workers", "1", ".",
    ], cwd=directory)  # fmt: skip
    signer.detach(directory / "repodata/repomd.xml", directory / "repodata/repomd.xml.asc")
