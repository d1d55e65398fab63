"""`make test-vm`: install the packages in virtual machines and take them through the life of a service.

Strategy: for each guest, build its package twice (this version and the next), put packages, agent, steps and
tests/kernel on the payload disk, boot, and let the agent run every step in order. Print the result of each step, and a
table of steps, verdicts and seconds at the end. A failed step does not end the run, because the next steps can still
give information. Exit status 0 only if every step of every guest passed.

    python tests/vm/drive.py [--guest debian12] [--step boot --step install ...] [--keep-console DIR]
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import image
from qemu import Machine, MachineError, pack_payload, qemu_missing

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
STEP_LIMIT_S = 420.0
MOST_DIAGNOSES = 3  # of failed steps; later failures mostly have the same cause
LIMITS_S = {"kernel_suite": 2400.0}  # a busy host takes 1,200 s for two thirds of it


@dataclass(frozen=True)
class Verdict:
    """The result of one step in one guest."""

    ok: bool
    seconds: float
    detail: str


@dataclass(frozen=True)
class Guest:
    """One machine: its title in reports, and the package that it installs. Its name is that of an image's recipe."""

    title: str
    package: str


GUESTS = {
    "debian12": Guest("Debian 12", "debian12-x86_64"),
    "debian13": Guest("Debian 13", "debian13"),
    "arm64": Guest("Debian 13 arm64", "debian13"),  # `make test-arm64`
}
DEFAULT = ("debian12", "debian13")


def package_builder() -> ModuleType:
    """Return packaging/build.py as a module. It is a script and not part of a Python package."""
    sys.path.insert(0, str(ROOT / "packaging"))
    return importlib.import_module("build")


# 0.1.0 was not tagged: the last commit before the changes of 0.2.
COMMIT_OF_0_1_0 = "983c6563"


def package_of_0_1_0(guest: str, scratch: Path) -> dict[str, Path]:
    """Build 0.1.0 with its own sources and packaging."""
    tree = scratch / "0.1.0"
    tree.mkdir()
    archive = subprocess.run(["git", "-C", str(ROOT), "archive", COMMIT_OF_0_1_0], stdout=subprocess.PIPE)
    if archive.returncode:
        raise image.ImageError(f"cannot build 0.1.0: this clone has no commit {COMMIT_OF_0_1_0}")
    subprocess.run(["tar", "-x", "-C", str(tree)], input=archive.stdout, check=True)
    flavour = "debian12" if guest == "debian12" else "debian13"
    environ = os.environ | {"SOURCE_DATE_EPOCH": str(package_builder().source_epoch())}
    command = [sys.executable, "packaging/build.py", "--dist", "dist", flavour]
    subprocess.run(command, cwd=tree, env=environ, check=True, stdout=subprocess.DEVNULL)
    (deb,) = (tree / "dist").glob("*.deb")
    return {f"packages/0/{deb.name}": deb}


def repository(package: Any, deb: Path, scratch: Path) -> dict[str, Path]:
    """Write an apt repository of the package, signed with a key that is made now. Return its files."""
    repositories = importlib.import_module("repositories")
    if missing := [tool for tool in ("apt-ftparchive", "gpg") if not shutil.which(tool)]:
        raise image.ImageError(f"cannot sign a repository: no {', '.join(missing)} (apt packages apt-utils gnupg)")
    builder = package_builder()
    epoch, home = builder.source_epoch(), scratch / "gnupg"
    home.mkdir(mode=0o700)
    os.environ["GNUPGHOME"] = str(home)
    made = ["gpg", "--batch", "--quiet", "--passphrase", "", "--faked-system-time", f"{epoch - 1}!"]
    subprocess.run([*made, "--quick-gen-key", "vm@example.org", "ed25519", "sign", "0"], check=True)
    signer, where = repositories.Signer("vm@example.org", epoch), scratch / "repository"
    repositories.write_apt({package: deb}, where / "apt", builder.MAINTAINER, signer)
    (where / "cnprocd.asc").write_bytes(signer.public_key())
    subprocess.run(["gpgconf", "--homedir", str(home), "--kill", "all"], check=True)  # the agent that gpg started
    return {f"repository/{path.relative_to(where)}": path for path in where.rglob("*") if path.is_file()}


def packages(guest: str, scratch: Path, names: Sequence[str] = ()) -> dict[str, Path]:
    """Build what the steps expect: this version and the next, a repository of this one, and 0.1.0 if a step has it."""
    builder = package_builder()
    package, epoch = builder.PACKAGES[GUESTS[guest].package], builder.source_epoch()
    found = package_of_0_1_0(guest, scratch) if any("0_1_0" in name for name in names) else {}
    for number in ("1", "2"):
        deb = builder.build(package.with_release(number), scratch / number, epoch)
        found[f"packages/{number}/{deb.name}"] = deb
        if number == "1":
            found |= repository(package, deb, scratch)
    return found


def payload(guest: str, scratch: Path, names: list[str]) -> Path:
    files = packages(guest, scratch, names)
    files |= {path.name: path for path in (HERE / "guest").glob("*.py")}
    for folder in ("tests/kernel", "tests/recordings", "tests/demo", "config/examples"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                files[str(path.relative_to(ROOT))] = path
    others = (
        "tests/conftest.py",
        "tests/unit/hookkit.py",
        "tests/unit/cli/test_recorded_examples.py",
        "pyproject.toml",
    )
    files |= {name: ROOT / name for name in others}
    return pack_payload(scratch / "payload.tar", files)


def steps_of(guest: Machine, names: list[str]) -> Iterator[tuple[str, Verdict]]:
    """Run `names` in order. A reboot ends with the agent's next hello."""
    for name in names:
        started = time.monotonic()
        try:
            if name == "reboot":
                uptime = guest.reboot()
                verdict = Verdict(True, time.monotonic() - started, f"agent up after {uptime:.0f} s")
            else:
                answer = guest.step(name, LIMITS_S.get(name, STEP_LIMIT_S) * guest.platform.slowness)
                verdict = Verdict(answer["ok"], answer["seconds"], answer["detail"])
        except MachineError as error:
            yield name, Verdict(False, time.monotonic() - started, str(error))
            return
        yield name, verdict


def take_through(name: str, names: list[str], console: Path | None) -> dict[str, Verdict]:
    """Run one guest from image to last step."""
    built = time.monotonic()
    disk = image.obtain(image.RECIPES[name])
    verdicts: dict[str, Verdict] = {}
    diagnoses = 0
    with tempfile.TemporaryDirectory(prefix="cnprocd-vm-") as directory:
        scratch = Path(directory)
        tar = payload(name, scratch, names)
        say(f"{GUESTS[name].title}: image and packages ready after {time.monotonic() - built:.0f} s")
        started = time.monotonic()
        with Machine(disk, tar, scratch) as guest:
            try:
                guest.wait_boot()
                say(f"{GUESTS[name].title}: booted in {time.monotonic() - started:.0f} s")
                for step, verdict in steps_of(guest, names):
                    verdicts[step] = verdict
                    say(f"{GUESTS[name].title}: {step}: {'ok' if verdict.ok else 'FAILED'} ({verdict.seconds:.0f} s)")
                    say("    " + verdict.detail.replace("\n", "\n    "))
                    if not verdict.ok and diagnoses < MOST_DIAGNOSES:
                        diagnoses += 1
                        say("    " + guest.step("diagnose", 60)["detail"].replace("\n", "\n    "))
            except MachineError as error:
                say(str(error))
            finally:
                if console is not None:
                    console.mkdir(parents=True, exist_ok=True)
                    shutil.copy(guest.console, console / f"{name}.log")
    return verdicts


def table(names: list[str], results: dict[str, dict[str, Verdict]]) -> str:
    """Return a table of steps, with one column for each guest, in seconds."""
    width = max(map(len, names))
    lines = ["step".ljust(width) + "".join(f"  {GUESTS[guest].title:>18}" for guest in results)]
    for name in names:
        cells = []
        for verdicts in results.values():
            verdict = verdicts.get(name)
            cells.append(
                "not run" if verdict is None else f"{'ok' if verdict.ok else 'FAILED'} {verdict.seconds:6.1f} s"
            )
        lines.append(name.ljust(width) + "".join(f"  {cell:>18}" for cell in cells))
    return "\n".join(lines)


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description="Take the packages through a service's life in booted machines.")
    parser.add_argument("--guest", action="append", choices=list(GUESTS), help="default: the two of amd64")
    parser.add_argument("--step", action="append", help="only these, in this order")
    parser.add_argument("--keep-console", type=Path, metavar="DIR")
    options = parser.parse_args()
    guests = options.guest or DEFAULT
    for architecture in {image.RECIPES[guest].architecture for guest in guests}:
        if reason := qemu_missing(architecture):
            say(f"cannot run the guests: {reason}")
            return 1
    listed = subprocess.run([sys.executable, str(HERE / "guest/steps.py"), "--list"], capture_output=True, text=True)
    names = options.step or listed.stdout.split()
    results: dict[str, dict[str, Verdict]] = {}
    for guest in guests:
        try:
            results[guest] = take_through(guest, names, options.keep_console)
        except image.ImageError as error:
            say(str(error))
            results[guest] = {}
    say("\n" + table(names, results))
    passed = sum(verdict.ok for verdicts in results.values() for verdict in verdicts.values())
    failed = len(names) * len(results) - passed
    say(f"\n{passed} passed, {failed} failed")
    return 0 if failed == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
