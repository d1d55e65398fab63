"""Build the packages twice for the tests, and print a table of them at the end of the run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from package.built import ROOT, VERSION, builder, flavours, unpack

SOURCES = (
    "cnprocd", "packaging", "systemd", "config", "docs", "pyproject.toml", "MANIFEST.in", "Makefile", "LICENSE",
    "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md",
)  # fmt: skip


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """Copy the packaged files: the checkout can change during a test that takes a minute."""
    where = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, where / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, where)
    return where


@pytest.fixture(scope="session")
def epoch():
    """Return the time stamp of all builds of this run, even if the checkout gets a commit meanwhile."""
    return builder.source_epoch()


@pytest.fixture(scope="session")
def build(source, epoch):
    """Return a function that builds all packages in a directory, with changes of environment and umask."""

    def run(where, cwd=ROOT, umask=0o022, **changes):
        environ = os.environ | {"SOURCE_DATE_EPOCH": str(epoch)} | changes
        command = [sys.executable, str(source / "packaging/build.py"), "--dist", str(where)]
        subprocess.run(command, check=True, env=environ, cwd=cwd, umask=umask)
        return where

    return run


@pytest.fixture(scope="session")
def dist(build, tmp_path_factory):
    """Return a directory with all packages: what `make package` built (CNPROCD_DIST), or a build of the tests."""
    made = os.environ.get("CNPROCD_DIST")
    return Path(made) if made else build(tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="session")
def second_dist(build, tmp_path_factory):
    """Build all packages again, with another environment, directory and umask."""
    scratch = tmp_path_factory.mktemp("a-longer-temporary-directory")
    changes = {"TZ": "Asia/Kathmandu", "LANG": "C", "HOSTNAME": "other", "USER": "nobody", "TMPDIR": str(scratch)}
    return build(tmp_path_factory.mktemp("second"), cwd=scratch, umask=0o077, **changes)


@pytest.fixture
def package(request, dist, record_property):
    """Return the package that the test's parameter names. Records of a test under `ran` and `lint` are in the table."""
    found = flavours.PACKAGES[request.param]
    record_property("package", found.name)
    record_property("size", f"{(dist / found.file_name(VERSION)).stat().st_size / 1e6:.1f} MB")
    return found


@pytest.fixture
def file(package, dist):
    """Return the package's file."""
    return dist / package.file_name(VERSION)


@pytest.fixture
def tree(file, tmp_path):
    """Return a directory with the package's files."""
    return unpack(file, tmp_path)


def pytest_terminal_summary(terminalreporter):
    """Print one row for each package: size, dependencies, lint, and what was run of it."""
    rows: dict[str, dict] = {}
    for report in terminalreporter.getreports("passed"):
        found = dict(report.user_properties)
        if report.when == "call" and "package" in found:
            row = rows.setdefault(found["package"], {"size": found["size"], "lint": "not run", "ran": []})
            row["lint"] = found.get("lint", row["lint"])
            row["ran"] += [value for name, value in report.user_properties if name == "ran"]
    table = [("package", "size", "depends on", "lint", "run")]
    for name, row in rows.items():
        package = flavours.PACKAGES[name]
        depends = ", ".join(package.flavour.depends)
        ran = "; ".join(row["ran"]) or "nothing"
        table.append((package.file_name(VERSION), row["size"], depends, row["lint"], ran))
    widths = [max(len(row[column]) for row in table) for column in range(4)]
    for cells in table if rows else ():
        line = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=False))
        terminalreporter.write_line(f"{line}  {cells[4]}")
