"""`make test-pythons`: run the unit tests under every Python that the packages use, where one can be had.

Interpreters come from PATH or pyenv. Each gets an environment in .pythons: with the files of the self-contained package
for this version, or without such a package, with the checkout and today's newest dependencies. If there is no
interpreter, root gets a tree of the Debian suite that has this version (mmdebstrap, kept in .pythons/), with the
dependencies as its packages, in which the tests run. A version that cannot be had is reported as skipped with
the reason, and fails nothing.

Style and instruction counts are left out: they are measured with one version. Tests that failed are run once more,
because other programs on this machine can disturb them. Exit status 1 if a test failed twice under any version.

    python tests/pythons.py [--others | --python 3.12 ...] [--installed] [-- PYTEST ARGUMENTS]
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from package.built import ROOT, builder, flavours, interpreter

VERSIONS = ("3.11", "3.12", "3.13", "3.14")
THIS = f"{sys.version_info.major}.{sys.version_info.minor}"
MADE = ROOT / ".pythons"
LEFT_OUT = ("tests/unit/test_lint.py", "tests/unit/test_instruction_guard.py")

# The suites whose python3 has this version. No suite has 3.12.
SUITES = {"3.11": "bookworm", "3.13": "trixie", "3.14": "testing"}
PACKAGES = (
    "python3", "python3-pydantic", "python3-structlog", "python3-sdnotify", "python3-yaml", "python3-pytest",
    "python3-hypothesis", "python3-jsonschema", "mount", "procps", "man-db",
)  # fmt: skip
# In a mount namespace of its own, so nothing stays mounted: $1 the tree, $2 the checkout, then the command. The tree
# becomes the root mount. After chroot(2), /proc/self/mountinfo has no root, and cnprocd cannot find the path of a file.
ENTER = """
mount --bind "$1" "$1"
for name in proc sys dev; do mount --rbind "/$name" "$1/$name"; done
mkdir -p "$1$2"
mount --bind "$2" "$1$2"
cd "$1"
checkout=$2
shift 2
pivot_root . .
umount --lazy .
cd "$checkout"
exec "$@"
"""


class SkipError(Exception):
    """A version cannot be tested here; the text is the reason."""


@dataclass(frozen=True)
class Place:
    """Where a version runs: the command that starts its interpreter, and a description of it."""

    command: tuple[str, ...]
    description: str


def environment(version: str, python: Path) -> Place:
    """Return an environment of this interpreter. Make it if it is missing. Raises SkipError.

    It has the files of the self-contained package for this version: its modules and pinned dependencies. If there is no
    such package, it has the checkout and today's newest dependencies.
    """
    where, package = MADE / version, _package(version)
    made, stamp = where / "bin/python", where / ".installed"
    if not stamp.exists():
        if subprocess.run([python, "-m", "venv", "--clear", str(where)]).returncode:
            raise SkipError(f"{python} cannot make a virtual environment")
        what = ["--editable", f"{ROOT}[dev]"] if package is None else builder.PROJECT["optional-dependencies"]["dev"]
        pip = [str(made), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *what], check=True)
        stamp.touch()
    if package is None:
        return Place((str(made), "-P"), str(python))
    tree = MADE / f"files-{version}"
    shutil.rmtree(tree, ignore_errors=True)
    builder.stage(package, tree, builder.source_epoch(), builder.MAINTAINER)
    (packages,) = where.glob("lib/python3*/site-packages")
    # First in the path, also in an isolated interpreter (-I): before what the tools of the tests depend on.
    line = f"import sys; sys.path.insert(0, {str(tree / package.flavour.modules)!r})\n"
    (packages / "cnprocd-package.pth").write_text(line)
    return Place((str(made), "-P"), f"{python}, files of the package {package.name}")


def _package(version: str) -> Any:
    """Return the first self-contained package for this version and this machine."""
    candidates = flavours.PACKAGES.values()
    fits = (one for one in candidates if (one.flavour.python, one.machine) == (version, platform.machine()))
    return next(fits, None)


def debian(version: str) -> Place:
    """Return the interpreter of a Debian suite. Make its tree if it is missing. Raises SkipError."""
    suite = SUITES.get(version)
    if suite is None:
        raise SkipError("no interpreter in PATH or pyenv, and no Debian suite has it")
    if os.geteuid() != 0 or not shutil.which("mmdebstrap"):
        raise SkipError(f"no interpreter in PATH or pyenv; Debian's {suite} needs root and mmdebstrap")
    tree = MADE / f"tree-{version}"
    if not tree.exists():
        _make_tree(suite, tree)
    inside = ("unshare", "--mount", "--propagation", "private", "sh", "-euc", ENTER, "sh", str(tree), str(ROOT))
    place = Place((*inside, "python3", "-P"), f"Debian {suite}")
    asked = [*place.command, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    found = subprocess.run(asked, capture_output=True, text=True)
    if found.stdout.strip() != version:
        raise SkipError(f"Debian's {suite} has {found.stdout.strip() or found.stderr.strip()}")
    return place


def _make_tree(suite: str, tree: Path) -> None:
    sys.path.insert(0, str(ROOT / "tests/vm"))
    image = importlib.import_module("image")
    MADE.mkdir(exist_ok=True)
    new = tree.with_suffix(".new")
    shutil.rmtree(new, ignore_errors=True)
    try:
        options = (*image.host_apt_options(), "Apt::Install-Recommends false")
        command = ["mmdebstrap", "--quiet", "--variant=apt", f"--include={','.join(PACKAGES)}",
                   *(f"--aptopt={option}" for option in options), suite, str(new),
                   f"deb {image.host_mirror()} {suite} main"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except image.ImageError as error:
        raise SkipError(f"cannot make a tree of Debian's {suite}: {error}") from error
    if done.returncode:
        raise SkipError(f"cannot make a tree of Debian's {suite}: {done.stderr.strip()[-500:]}")
    # As an editable installation: isolated interpreters (-I) import it as well.
    (new / "usr/lib/python3/dist-packages/cnprocd-checkout.pth").write_text(f"{ROOT}\n")
    new.rename(tree)


def place_of(version: str, installed: bool) -> Place:
    """Return where this version runs. Raises SkipError."""
    found = interpreter(version)
    if found is not None:
        return environment(version, found)
    if installed:
        raise SkipError("no interpreter in PATH or pyenv")
    return debian(version)


def unit_tests(version: str, place: Place, arguments: list[str]) -> tuple[bool, str]:
    """Run the unit tests. Return whether they passed, and pytest's last line."""
    files = arguments or ["tests/unit", *(f"--ignore={name}" for name in LEFT_OUT)]
    cache = f"cache_dir={MADE / f'cache-{version}'}"
    command = [*place.command, "-m", "pytest", "-q", "--disable-warnings", "-o", cache, *files]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as pytest:
        assert pytest.stdout is not None
        last = ""
        for line in pytest.stdout:
            sys.stdout.write(line)
            last = line.strip() or last
    return pytest.returncode == 0, last


def result(version: str, installed: bool, arguments: list[str]) -> tuple[bool, str]:
    """Test one version, and its failed tests once more. Return whether they passed, and the line that reports it."""
    try:
        place = place_of(version, installed)
    except SkipError as error:
        return True, f"Python {version}: skipped: {error}"
    ok, last = unit_tests(version, place, arguments)
    lines = [f"Python {version} ({place.description}): {last}"]
    if not ok:
        again = [*(arguments or ["tests/unit"]), "--last-failed", "--last-failed-no-failures", "none"]
        ok, last = unit_tests(version, place, again)
        lines.append(f"    the failed tests once more: {last}")
    return ok, "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", action="append", choices=VERSIONS, help="default: all")
    parser.add_argument("--others", action="store_true", help=f"all but {THIS}, which `make test` uses")
    parser.add_argument("--installed", action="store_true", help="only interpreters of this machine, no Debian suites")
    parser.add_argument("arguments", nargs="*", help="arguments of pytest; default: all unit tests")
    options = parser.parse_args()
    versions = options.python or [version for version in VERSIONS if not (options.others and version == THIS)]
    results = [result(version, options.installed, options.arguments) for version in versions]
    sys.stdout.write("\n" + "".join(f"{line}\n" for _, line in results))
    return 0 if all(ok for ok, _ in results) else 1


if __name__ == "__main__":
    sys.exit(main())
