"""What the tests of this directory share: the modules of packaging/, and which packages can run here."""

from __future__ import annotations

import importlib
import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "packaging"))  # scripts, not part of a Python package
builder = importlib.import_module("build")
flavours = importlib.import_module("flavours")
repositories = importlib.import_module("repositories")
release = importlib.import_module("release")

VERSION = builder.VERSION
PACKAGES = list(flavours.PACKAGES)
DEBS = [name for name, package in flavours.PACKAGES.items() if package.flavour.packager == "deb"]
RPMS = [name for name in PACKAGES if name not in DEBS]
SELF_CONTAINED = [name for name, package in flavours.PACKAGES.items() if package.flavour.abi]
# The directory of pyenv, where it has one version for each minor one.
PYENV = Path.home() / ".pyenv/versions"


def interpreter(python: str) -> Path | None:
    """Return an interpreter of this minor version: in PATH, or of pyenv."""
    found = [Path(name) for name in (shutil.which(f"python{python}"),) if name]
    found += [version / "bin/python3" for version in sorted(PYENV.glob(f"{python}.*"))]
    for path in found:
        program = "import sys; print('%d.%d' % sys.version_info[:2])"
        # pyenv has shims in PATH for versions that are not in use: they fail.
        done = subprocess.run([path, "-I", "-c", program], capture_output=True, text=True)
        if done.stdout.strip() == python:
            return path
    return None


def runs_here(name: str) -> bool:
    """Return whether this machine is the package's."""
    return flavours.PACKAGES[name].machine in {"any", platform.machine()}


def unpack(path: Path, where: Path) -> Path:
    """Unpack a package's files into `where`."""
    if path.suffix == ".deb":
        subprocess.run(["dpkg-deb", "-x", str(path), str(where)], check=True)
    else:
        archive = subprocess.run(
            ["rpm2archive", "-n", "-"], stdin=path.open("rb"), capture_output=True, check=True
        ).stdout
        subprocess.run(["tar", "-x", "-C", str(where)], input=archive, check=True)
    return where
