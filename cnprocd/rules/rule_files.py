"""Which files hold the rules, and digests of their contents. The files are not parsed here.

The rules are in a main file and its drop-ins; the file `disabled` beside the main file names the disabled rules. With
`--rules FILE` there are no drop-ins. The digests show whether the files on the disk differ from the loaded ones.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

MAIN_FILE = Path("/etc/cnprocd/rules.yaml")
# Highest precedence first, as in systemd: the administrator over the running system over the packages.
DROPIN_DIRS = (Path("/etc/cnprocd/rules.d"), Path("/run/cnprocd/rules.d"), Path("/usr/lib/cnprocd/rules.d"))
DISABLED_NAME = "disabled"
LARGEST = 1 << 20  # bytes of a file that is read


@dataclass(frozen=True, slots=True)
class DropIns:
    """The content of the drop-in directories."""

    files: tuple[Path, ...]  # in the order of their names; of several with one name, the one that takes precedence
    ignored: tuple[Path, ...]  # their names suggest rules, but do not end in .yaml
    unreadable: tuple[tuple[Path, OSError], ...]  # directories


def find_dropins(directories: Sequence[Path] = DROPIN_DIRS) -> DropIns:
    """Return the drop-ins in `directories`, which begin with the highest precedence."""
    chosen: dict[str, Path] = {}
    ignored, unreadable = [], []
    for directory in directories:
        try:
            names = sorted(os.listdir(directory))
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            unreadable.append((directory, error))
            continue
        for name in names:
            if name.endswith(".yaml"):
                chosen.setdefault(name, directory / name)
            elif name.endswith((".yml", ".json")):
                ignored.append(directory / name)
    return DropIns(tuple(chosen[name] for name in sorted(chosen)), tuple(ignored), tuple(unreadable))


def disabled_path(main_file: Path | None) -> Path:
    """Return the path of the file with the names of disabled rules, for a main file (None: the default one)."""
    return (main_file or MAIN_FILE).absolute().with_name(DISABLED_NAME)


def rule_files(main_file: Path | None) -> tuple[Path, ...]:
    """Return the paths of all files that a daemon with this --rules reads. Some may not exist."""
    dropins = find_dropins().files if main_file is None else ()
    return (main_file or MAIN_FILE, *dropins, disabled_path(main_file))


def file_digests(paths: Sequence[Path]) -> dict[Path, str]:
    """Return the digest of each file that exists. The digest of an unreadable file is the reason."""
    found = {}
    for path in paths:
        try:
            found[path] = _digest(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            found[path] = os.strerror(error.errno or 0)
    return found


def _digest(path: Path) -> str:
    """Return the digest of a file, or its type if it is not a regular file: that is never read."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode):
            return f"type {stat.S_IFMT(mode):o}"
        with os.fdopen(fd, "rb", closefd=False) as file:
            return hashlib.sha256(file.read(LARGEST + 1)).hexdigest()
    finally:
        os.close(fd)


def changed(before: Mapping[Path, str], now: Mapping[Path, str]) -> tuple[Path, ...]:
    """Return the files that were added, removed or changed, in the order of their paths."""
    return tuple(sorted(path for path in {*before, *now} if before.get(path) != now.get(path)))
