"""cnprocd/__init__.py is the only place of the version; everything else has the same."""

import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import yaml

from cnprocd import __version__

ROOT = Path(__file__).parents[2]


def test_the_version_is_written_in_one_place():
    found = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in found["project"]
    assert found["project"]["dynamic"] == ["version"]
    assert found["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "cnprocd.__version__"}
    assert (ROOT / "cnprocd/__init__.py").read_text().count(__version__) == 1


def test_the_commands_print_the_version():
    for name in ("cnprocd", "cnprocctl"):
        command = [sys.executable, "-m", f"cnprocd.cli.{name}", "--version"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.stdout == f"{name} {__version__}\n", done.stderr


def test_the_packages_have_the_version(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "packaging"))
    assert __version__ == importlib.import_module("build").VERSION


def test_the_manual_pages_have_the_version():
    pages = sorted((ROOT / "packaging/man").glob("*.in"))
    headings = [re.search(r"^\.TH .*$", page.with_suffix("").read_text(), re.M)[0] for page in pages]
    assert len(pages) > 3
    assert not [line for line in headings if f'"cnprocd {__version__}"' not in line]


def test_the_image_in_the_manifest_has_the_version():
    documents = yaml.safe_load_all((ROOT / "packaging/container/daemonset.yaml").read_text())
    (daemonset,) = [one for one in documents if one["kind"] == "DaemonSet"]
    images = {one["image"] for one in daemonset["spec"]["template"]["spec"]["containers"]}
    assert {image.rpartition(":")[2] for image in images} == {__version__}


def test_the_newest_section_of_the_changelog_is_the_version():
    assert re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[0] == __version__
