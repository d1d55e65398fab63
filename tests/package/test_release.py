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
from pathlib import Path

import pytest
from package.built import PACKAGES, ROOT, RPMS, VERSION, builder, flavours, repositories

pytestmark = pytest.mark.skipif(
    bool(repositories.missing_tools()), reason=f"not installed: {' '.join(repositories.missing_tools())}"
)
KEY = "release-test@example.org"


@pytest.fixture(scope="session")
def keyring(epoch, tmp_path_factory):
    """Make a key that is a day older than the release, in a keyring of its own."""
    home = tmp_path_factory.mktemp("gnupg")
    home.chmod(0o700)
    made = epoch - 86_400
    command = ["gpg", "--batch", "--quiet", "--homedir", str(home), "--faked-system-time", f"{made}!"]
    command += ["--passphrase", "", "--quick-gen-key", KEY, "ed25519", "sign", "0"]
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
