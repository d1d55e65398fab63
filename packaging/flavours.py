"""The packages as data: one Flavour for each distribution, one Package for each of its machines.

PURE. Strategy: a distribution that has pydantic 2 gets a package without it, for all machines. Every other package is
self-contained: pinned wheels for one CPython, in a directory that no Python minor version owns.

Facts relied on: EL 8 (since 8.10) and EL 9 (since 9.4) have python3.12 beside their python3. SLES 15 has python311
since SP4. Ubuntu 22.04 has python3.11 in universe. EL 10 and Ubuntu 24.04 have CPython 3.12 as python3. ~ sorts before
everything in a Debian version, so that an upgrade of the distribution upgrades the package as well. A minimal Debian 13
lacks passwd, whose userdel the purge needs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

PRIVATE = "usr/lib/cnprocd"
DIST_PACKAGES = "usr/lib/python3/dist-packages"

Packager = Literal["deb", "rpm"]
Machine = Literal["x86_64", "aarch64", "any"]

# Settings of units that are newer than the oldest systemd here: "Added in version" in its manual pages.
SYSTEMD_SINCE = {
    "LogRateLimitIntervalSec": 240, "ProtectHostname": 242, "RestrictSUIDSGID": 242, "OOMPolicy": 243,
    "ProtectKernelLogs": 244, "ProtectClock": 245, "RestartSteps": 254, "RestartMaxDelaySec": 254,
}  # fmt: skip

# GOARCH names, which nfpm translates to those of the packager.
_GOARCH = {"x86_64": "amd64", "aarch64": "arm64", "any": "all"}


@dataclass(frozen=True)
class Flavour:
    """One distribution: what it has, and what its package needs.

    `kernel` and `systemd` are the oldest that the distribution ships. `suite` is the directory in the repositories.
    `abi` names the CPython of the pinned wheels; without one, the dependencies are packages of the distribution.
    """

    name: str
    title: str
    packager: Packager
    release: str
    suite: str
    kernel: str
    systemd: int
    python: str
    interpreter: str
    depends: tuple[str, ...]
    abi: str = ""
    modules: str = PRIVATE

    @property
    def private(self) -> bool:
        """Return whether the launchers must add the directory of the modules to the path."""
        return self.modules == PRIVATE

    @property
    def machines(self) -> tuple[Machine, ...]:
        """Return the machines that a package is built for. Without wheels, nothing in it is compiled."""
        return ("x86_64", "aarch64") if self.abi else ("any",)


@dataclass(frozen=True)
class Package:
    """One file to build."""

    flavour: Flavour
    machine: Machine

    @property
    def name(self) -> str:
        return self.flavour.name if self.machine == "any" else f"{self.flavour.name}-{self.machine}"

    @property
    def goarch(self) -> str:
        return _GOARCH[self.machine]

    def file_name(self, version: str) -> str:
        """Return the name of the package's file, by the conventions of dpkg and rpm."""
        if self.flavour.packager == "deb":
            return f"cnprocd_{version}-{self.flavour.release}_{self.goarch}.deb"
        return f"cnprocd-{version}-{self.flavour.release}.{self.machine.replace('any', 'noarch')}.rpm"

    @property
    def lock(self) -> str:
        """Return the name of the file in packaging/locks that pins the wheels."""
        return f"{self.flavour.abi}-{self.machine}.txt"

    def with_release(self, number: str) -> Package:
        """Return this package with another first number in its release: an upgrade of the same version."""
        return replace(self, flavour=replace(self.flavour, release=self.flavour.release.replace("1", number, 1)))


def _el(major: int, kernel: str, systemd: int, requires: str) -> Flavour:
    return Flavour(
        name=f"el{major}", title=f"RHEL, Oracle Linux, Alma and Rocky {major}", packager="rpm", release=f"1.el{major}",
        suite=f"el{major}", kernel=kernel, systemd=systemd, python="3.12", interpreter="/usr/bin/python3.12",
        depends=(requires, "systemd"), abi="cp312",
    )  # fmt: skip


FLAVOURS = {
    flavour.name: flavour
    for flavour in (
        Flavour(
            name="debian12", title="Debian 12", packager="deb", release="1~deb12", suite="bookworm", kernel="6.1",
            systemd=252, python="3.11", interpreter="/usr/bin/python3", abi="cp311",
            depends=("python3 (>= 3.11)", "python3 (<< 3.12)", "libc6 (>= 2.17)", "systemd", "passwd"),
        ),
        Flavour(
            name="debian13", title="Debian 13", packager="deb", release="1", suite="trixie", kernel="6.12",
            systemd=257, python="3.13", interpreter="/usr/bin/python3", modules=DIST_PACKAGES,
            depends=("python3 (>= 3.11)", "python3-pydantic (>= 2)", "python3-structlog", "python3-sdnotify",
                     "python3-yaml", "systemd", "passwd"),
        ),
        Flavour(
            name="ubuntu22.04", title="Ubuntu 22.04", packager="deb", release="1~ubuntu22.04", suite="jammy",
            kernel="5.15", systemd=249, python="3.11", interpreter="/usr/bin/python3.11", abi="cp311",
            depends=("python3.11", "libc6 (>= 2.17)", "systemd", "passwd"),
        ),
        Flavour(
            name="ubuntu24.04", title="Ubuntu 24.04", packager="deb", release="1~ubuntu24.04", suite="noble",
            kernel="6.8", systemd=255, python="3.12", interpreter="/usr/bin/python3", abi="cp312",
            depends=("python3 (>= 3.12)", "python3 (<< 3.13)", "libc6 (>= 2.17)", "systemd", "passwd"),
        ),
        _el(8, "4.18", 239, "python3.12"),
        _el(9, "5.14", 252, "python3.12"),
        _el(10, "6.12", 257, "python(abi) = 3.12"),
        Flavour(
            name="sles15", title="SLES 15 SP4 and newer", packager="rpm", release="1.sles15", suite="sles15",
            kernel="5.14", systemd=249, python="3.11", interpreter="/usr/bin/python3.11", abi="cp311",
            depends=("python311", "systemd"),
        ),
        Flavour(
            name="fedora", title="Fedora", packager="rpm", release="1", suite="fedora", kernel="6.12", systemd=256,
            python="3.13", interpreter="/usr/bin/python3",
            depends=("python3 >= 3.11", "python3-pydantic >= 2", "python3-structlog", "python3-sdnotify",
                     "python3-pyyaml", "systemd"),
        ),
    )
}  # fmt: skip

PACKAGES = {
    package.name: package
    for flavour in FLAVOURS.values()
    for package in (Package(flavour, machine) for machine in flavour.machines)
}


@dataclass(frozen=True)
class Pin:
    """One line of a lock: a distribution of PyPI, its version, and the SHA-256 sums of the files that are accepted."""

    name: str
    version: str
    sha256: tuple[str, ...]


def pins(lock: str) -> list[Pin]:
    """Return the pins of a lock's text (pip's requirements format)."""
    found = []
    for line in lock.replace("\\\n", " ").splitlines():
        if line.strip() and not line.startswith("#"):
            name, version = line.split()[0].split("==")
            found.append(Pin(name, version, tuple(re.findall(r"--hash=sha256:([0-9a-f]{64})", line))))
    return found


def bundled_provides(lock: list[Pin]) -> list[str]:
    """Return Provides: of an rpm that contains these (Fedora's guidelines on bundling)."""
    return [f"bundled(python3dist({normalized(pin.name)})) = {pin.version}" for pin in lock]


def normalized(name: str) -> str:
    """Return a name as indexes and purls write it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def unit_for(text: str, systemd: int) -> str:
    """Return a unit's text without the settings that this version of systemd does not know and would warn about."""
    lines = text.splitlines(keepends=True)
    return "".join(line for line in lines if SYSTEMD_SINCE.get(line.partition("=")[0], 0) <= systemd)


def zsh_directory(packager: Packager) -> str:
    """Return where zsh of the distribution looks for completions of packages."""
    return {"deb": "usr/share/zsh/vendor-completions", "rpm": "usr/share/zsh/site-functions"}[packager]
