"""The rpms installed, upgraded and erased with `rpm --root`: scriptlets, user, byte code, configuration.

The root is an overlay of this machine's file system, so it has a shell, systemd's tools and the interpreter. Nothing
that happens in it stays. It is not a root of the rpm's distribution: dependencies are not checked.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess

import pytest
from package.built import RPMS, builder, flavours, interpreter, runs_here

NATIVE = [name for name in RPMS if runs_here(name) and flavours.PACKAGES[name].flavour.abi]
pytestmark = [
    pytest.mark.skipif(not shutil.which("rpm") or os.geteuid() != 0, reason="needs rpm and root"),
    pytest.mark.parametrize("package", NATIVE, indirect=True),
]


@pytest.fixture
def root(package, tmp_path):
    """Mount an overlay of / with the interpreter that the package requires and a policy that enables no service."""
    python = interpreter(package.flavour.python)
    if python is None:
        pytest.skip(f"no Python {package.flavour.python} here")
    upper, work, merged = (tmp_path / name for name in ("upper", "work", "root"))
    for directory in (upper, work, merged):
        directory.mkdir()
    options = f"lowerdir=/,upperdir={upper},workdir={work}"
    mount = subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, str(merged)], capture_output=True)
    if mount.returncode:
        pytest.skip(f"cannot mount an overlay of /: {mount.stderr.decode().strip()}")
    try:
        subprocess.run(["mount", "-t", "proc", "proc", str(merged / "proc")], check=True)  # systemd-tmpfiles needs it
        command = merged / package.flavour.interpreter.lstrip("/")
        if not command.exists():
            command.symlink_to(python)
        presets = merged / "etc/systemd/system-preset"
        presets.mkdir(parents=True, exist_ok=True)
        (presets / "00-test.preset").write_text("disable *\n")  # as 99-default-disable.preset of EL and Fedora
        yield merged
    finally:
        subprocess.run(["umount", "--recursive", str(merged)], check=True)


def rpm(root, *arguments):
    """Run rpm in the root and return what it printed. A scriptlet that fails makes it print a warning."""
    command = ["rpm", "--root", str(root), "--dbpath", "/var/lib/rpm-test", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not re.search("scriptlet failed|required for|error", done.stdout + done.stderr), done.stdout + done.stderr
    return done.stdout + done.stderr


def inside(root, *command):
    return subprocess.run(["chroot", str(root), *command], capture_output=True, text=True)


def test_an_rpm_installs_upgrades_and_erases(package, file, root, epoch, tmp_path, record_property):
    rpm(root, "-i", "--nodeps", str(file))
    assert "cnprocd" in inside(root, "getent", "passwd", "cnprocd").stdout
    assert inside(root, "systemctl", "is-enabled", "cnprocd.service").stdout == "disabled\n"
    modules = root / flavours.PRIVATE
    assert list(modules.glob(f"cnprocd/__pycache__/*.cpython-{package.flavour.abi[2:]}.pyc"))
    assert inside(root, "cnprocd", "--version").stdout.startswith("cnprocd ")
    assert inside(root, "cnprocd", "--check").returncode == 0
    rules = root / "etc/cnprocd/rules.yaml"
    rules.write_text("# edited\nrules: []\n")

    newer = builder.build(package.with_release("2"), tmp_path, epoch)
    rpm(root, "-U", "--nodeps", str(newer))
    assert rules.read_text() == "# edited\nrules: []\n"
    assert rpm(root, "-q", "cnprocd").strip() == newer.name.removesuffix(".rpm")
    assert "/etc/cnprocd/rules.yaml" in inside(root, "cnprocctl", "check").stdout

    assert "rules.yaml.rpmsave" in rpm(root, "-e", "cnprocd")
    left = [path for path in (root / "usr").rglob("*cnprocd*") if not path.is_relative_to(root / "usr/share/doc")]
    assert not left
    record_property("ran", "installed, upgraded, erased with rpm --root")
