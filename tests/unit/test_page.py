"""The Cockpit page: what its source may not do, and how large it may be. `make test-page` uses it in a browser."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "packaging/cockpit"
SOURCES = sorted(path for path in PAGE.iterdir() if path.suffix in (".js", ".html", ".css"))
MOST_LINES = 1500
LONGEST_LINE = 170
# Each of these could turn text of a process into markup or code.
DANGEROUS = (
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|setHTML|srcdoc|createContextualFragment"
    r"|\beval\(|new Function|javascript:|set(?:Timeout|Interval)\(\s*[\"'`]"
)


def test_the_page_is_small_and_has_no_dependency():
    lines = {path.name: path.read_text().splitlines() for path in SOURCES}
    assert sum(map(len, lines.values())) <= MOST_LINES
    assert {name for name, each in lines.items() if max(map(len, each)) > LONGEST_LINE} == set()
    imported = {name for path in SOURCES for name in re.findall(r'from "([^"]+)"', path.read_text())}
    assert imported <= {f"./{path.name}" for path in SOURCES}
    linked = set(re.findall(r'(?:src|href)="([^"#]+)"', (PAGE / "index.html").read_text()))
    assert linked == {"page.css", "../base1/cockpit.js", "main.js"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_text_can_become_markup_or_code(path):
    assert re.findall(DANGEROUS, path.read_text()) == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_name_of_another_server_stands_in_the_page(path):
    """Everything comes from the machine that is administered."""
    assert set(re.findall(r"https?://[^\s\"')]+", path.read_text())) <= {"http://www.w3.org/2000/svg"}


def test_commands_are_lists_and_no_shell():
    texts = "".join(path.read_text() for path in SOURCES)
    programs = set(re.findall(r"(?:run|spawn)\(\[\"([^\"]+)\"", texts))
    assert programs == {"cnprocctl", "systemctl"}
    assert "cockpit.script" not in texts


def test_the_manifest_names_the_page():
    manifest = json.loads((PAGE / "manifest.json").read_text())
    assert list(manifest["menu"]) == ["index"]
    assert (PAGE / "index.html").exists()


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
@pytest.mark.parametrize("path", [path for path in SOURCES if path.suffix == ".js"], ids=lambda path: path.name)
def test_a_module_of_the_page_has_no_syntax_error(path):
    command = ["node", "--input-type=module", "--check"]
    done = subprocess.run(command, input=path.read_text(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
