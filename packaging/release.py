"""Build a release: `python packaging/release.py --key KEY [--out DIR]` (`make release KEY=...`). See docs/release.md.

    DIR/*.deb *.rpm *.whl *.tar.gz   all packages (the rpms signed), the wheel and the source of PyPI
    DIR/cnprocd-VERSION.cdx.json     the bill of materials
    DIR/apt DIR/rpm                  repositories to serve as they are
    DIR/cnprocd.asc                  the public key
    DIR/SHA256SUMS SHA256SUMS.asc    of every file above

Reproducible: the same commit, key, pins and tools give the same bytes. tests/package/test_release.py compares two.

The maintainer is that of pyproject.toml. If its address is in a reserved domain, which no mail reaches, the holder of
the key is the maintainer: the user ID of the key that signs is a name that the releaser stands for.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import build
import sbom
from flavours import PACKAGES, Package
from repositories import ReleaseError, Signer, missing_tools, run, write_apt, write_rpm

TREES = ("cnprocd", "config", "docs", "packaging", "systemd")
FILES = (
    "pyproject.toml", "MANIFEST.in", "Makefile", "LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md",
    "SECURITY.md",
)  # fmt: skip
# setuptools of packaging/locks/tools.txt, without an isolated environment that would fetch another one.
BUILD = "import sys; from setuptools import build_meta as b; d = sys.argv[1]; b.build_sdist(d); b.build_wheel(d)"


RESERVED = re.compile(r"[@.](example(\.com|\.net|\.org)?|test|invalid|localhost)>?$")  # RFC 2606


def maintainer(signer: Signer) -> str:
    """Return the name and address in all packages of this release."""
    return (RESERVED.search(build.MAINTAINER) and signer.holder()) or build.MAINTAINER


def with_maintainer(project: str, maintainer: str) -> str:
    """Return the text of pyproject.toml with this maintainer. Raises ReleaseError if it has another form."""
    name, _, address = maintainer.removesuffix(">").rpartition(" <")
    changed, count = re.subn(
        r"(?m)^maintainers = \[.*?\]",
        lambda _: f"maintainers = [{{ name = {json.dumps(name)}, email = {json.dumps(address)} }}]",
        project,
    )
    if count != 1:
        raise ReleaseError("cannot set the maintainer: pyproject.toml has no line `maintainers = [...]`")
    return changed


def python_distributions(out: Path, epoch: int, maintainer: str) -> None:
    """Build the wheel and the source archive from a copy with fixed modes."""
    with tempfile.TemporaryDirectory(prefix="cnprocd-source-") as scratch:
        source, made = Path(scratch, "source"), Path(scratch, "made")
        made.mkdir()
        for name in TREES:
            shutil.copytree(build.ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in FILES:
            shutil.copy(build.ROOT / name, source)
        project = source / "pyproject.toml"
        project.write_text(with_maintainer(project.read_text(), maintainer))
        for path in source.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        os.environ["SOURCE_DATE_EPOCH"] = str(epoch)
        run([sys.executable, "-c", BUILD, str(made)], cwd=source)
        for path in made.iterdir():
            if path.suffix == ".whl":
                shutil.copy(path, out)
            else:
                (out / path.name).write_bytes(normal_archive(path.read_bytes(), epoch))


def normal_archive(data: bytes, epoch: int) -> bytes:
    """Return a .tar.gz with its members in order, one owner and one time. setuptools writes those of the build."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(data)) as old, tarfile.open(fileobj=tar, mode="w") as new:
        for member in sorted(old.getmembers(), key=lambda member: member.name):
            member.uid = member.gid = 0
            member.uname = member.gname = "root"
            member.mtime = epoch
            member.mode = 0o755 if member.isdir() else 0o644
            member.pax_headers = {}
            new.addfile(member, old.extractfile(member) if member.isfile() else None)
    return gzip.compress(tar.getvalue(), 9, mtime=0)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def sums(out: Path) -> str:
    """Return the lines of SHA256SUMS, as sha256sum(1) writes and checks them."""
    files = sorted(path for path in out.rglob("*") if path.is_file())
    return "".join(f"{digest(path)}  {path.relative_to(out)}\n" for path in files)


def release(out: Path, signer: Signer) -> None:
    """Write everything into the empty directory `out`."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(signer.epoch))
    (out / "cnprocd.asc").write_bytes(signer.public_key())
    named = maintainer(signer)
    files: dict[Package, Path] = {}
    for package in PACKAGES.values():
        files[package] = build.build(package, out, signer.epoch, named)
        if package.flavour.packager == "rpm":
            signer.sign_rpm(files[package])
    python_distributions(out, signer.epoch, named)
    bundles = {package: (build.locked(package), build.bundle(package)) for package in files if package.flavour.abi}
    built = {path.name: digest(path) for path in out.iterdir() if path.suffix in {".deb", ".rpm", ".whl", ".gz"}}
    document = sbom.bill(build.VERSION, build.PROJECT["license"]["text"], stamp, bundles, built)
    (out / f"cnprocd-{build.VERSION}.cdx.json").write_text(json.dumps(document, indent=1) + "\n")
    debs = {package: path for package, path in files.items() if package.flavour.packager == "deb"}
    write_apt(debs, out / "apt", named, signer)
    write_rpm({package: path for package, path in files.items() if package not in debs}, out / "rpm", signer)
    (out / "SHA256SUMS").write_text(sums(out))
    signer.detach(out / "SHA256SUMS", out / "SHA256SUMS.asc")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--key", required=True, help="fingerprint or address of the signing key in gpg's keyring")
    parser.add_argument("--out", type=Path, default=build.ROOT / "release")
    options = parser.parse_args()
    if missing := missing_tools():
        parser.error(f"cannot find {', '.join(missing)} (Debian: apt install apt-utils createrepo-c gnupg rpm)")
    if options.out.exists():
        parser.error(f"{options.out} exists; remove it, or name another directory with --out")
    os.umask(0o022)  # of the files that setuptools makes and puts into the wheel
    options.out.mkdir(parents=True)
    signer = Signer(options.key, build.source_epoch())
    try:
        release(options.out, signer)
    except ReleaseError as error:
        raise SystemExit(str(error)) from error
    sys.stdout.write((options.out / "SHA256SUMS").read_text())
    named = maintainer(signer)
    if not signer.is_rsa:
        sys.stdout.write("warning: the key is not RSA: older versions of rpm, as in EL 8, refuse its signatures\n")
    warning = " (no mail reaches it: set `maintainers` in pyproject.toml)" if RESERVED.search(named) else ""
    sys.stdout.write(f"maintainer of all packages: {named}{warning}\n")


if __name__ == "__main__":
    main()
