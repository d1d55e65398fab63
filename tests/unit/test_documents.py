"""The documents agree with the tree: links, paths, commands and tests exist, and each figure stands in one document."""

import ast
import importlib
import json
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "SECURITY.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "tests/bench/results/README.md",
]
MOST_README_WORDS = 900
LONGEST_TEST_NAME = 60
# The directories whose files a document may name by a path from the top, or (second line) from the package.
TOP = ("cnprocd", "tests", "docs", "config", "packaging", "systemd")
ROOMS = tuple(path.name for path in (ROOT / "cnprocd").iterdir() if path.is_dir())
sys.path.insert(0, str(ROOT / "packaging"))  # flavours.py: the table of packages
MADE = (".venv/",)  # not in the tree: a command makes it

each_document = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix().replace("/", "-")
)


@cache
def text_of(document: Path) -> str:
    return document.read_text(encoding="utf-8")


def without_code_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```|^    .*$", "", text, flags=re.M | re.S if "```" in text else re.M)


def anchors(document: Path) -> set[str]:
    """Return the anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text_of(document), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@cache
def names_of_tests() -> frozenset[str]:
    return frozenset(
        node.name
        for path in (ROOT / "tests").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    )


def test_the_readme_has_at_most_900_words():
    words = len(text_of(ROOT / "README.md").split())
    assert words <= MOST_README_WORDS, f"{words} words: move facts to docs/"


def test_the_readme_keeps_the_commands_that_others_look_for():
    text = text_of(ROOT / "README.md")
    assert "\n    make test\n" in text, ".ci/run finds the test command by this line"
    assert "make demo" in text
    assert "make run" in text


def test_the_readme_installs_one_package_for_each_release():
    """Each command that installs from dist/ takes one package, and every package of this machine has a command."""
    flavours = importlib.import_module("flavours")
    patterns = re.findall(r"^    (?:apt|dnf|zypper) install \./(\S+)", text_of(ROOT / "README.md"), re.M)
    for machine, deb in (("x86_64", "amd64"), ("aarch64", "arm64")):
        names = [
            f"dist/{one.file_name('1.0')}" for one in flavours.PACKAGES.values() if one.machine in (machine, "any")
        ]
        here = [pattern.replace("x86_64", machine).replace("amd64", deb) for pattern in patterns]
        taken = [[name for name in names if Path(name).match(pattern)] for pattern in here]
        assert sorted(taken) == sorted([name] for name in names)


def test_the_table_of_distributions_is_that_of_the_packages():
    flavours = importlib.import_module("flavours").FLAVOURS
    rows = [
        line.strip("| ").split(" | ") for line in text_of(ROOT / "docs/install.md").splitlines() if line[:2] == "| "
    ]
    written = [(row[0], row[1], row[2], row[3].split()[0]) for row in rows[1:]]
    facts = [(one.title, one.kernel, str(one.systemd), one.python) for one in flavours.values()]
    assert written == facts


@each_document
def test_every_link_leads_somewhere(document):
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(document)):
        if link.startswith(("https:", "http:", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), f"{link}: no such file"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"


@each_document
def test_every_path_in_a_document_exists(document):
    for named in re.findall(r"`([\w./*-]+/[\w./*-]*)`", text_of(document)):
        first = named.split("/")[0]
        if first in TOP:
            assert list(ROOT.glob(named)) or (ROOT / named).exists(), f"{named}: no such file"
        elif first in ROOMS:
            assert list((ROOT / "cnprocd").glob(named)), f"{named}: no such file in cnprocd/"


@each_document
def test_every_module_in_a_document_exists(document):
    for named in re.findall(r"`(\w+\.py)`", text_of(document)):
        found = [path for top in ("cnprocd", "tests", "packaging") for path in (ROOT / top).rglob(named)]
        assert found, f"{named}: no such module"


@each_document
def test_every_test_in_a_document_exists(document):
    for named in re.findall(r"`(test_\w+\*?)`", text_of(document)):
        if named.endswith("*"):
            assert any(name.startswith(named[:-1]) for name in names_of_tests()), named
        else:
            assert named in names_of_tests(), named


@each_document
def test_every_make_target_in_a_document_exists(document):
    targets = set(re.findall(r"^([\w-]+):", text_of(ROOT / "Makefile"), re.M))
    used = re.findall(r"(?:`|^    )make ([\w-]+)", text_of(document), re.M)
    assert set(used) <= targets, set(used) - targets


def figures(text: str) -> set[str]:
    """Return the measured figures of a text: numbers of at least three significant digits with a unit or in a table."""
    unit = r"(?: ?(?:x|ms|s|us|MB|KiB|%)\b| microseconds)"
    found = re.findall(rf"(?<![\w.,~-])(\d[\d,]*\.?\d*{unit})", text)
    cells = [cell.strip() for line in text.splitlines() if line.startswith("|") for cell in line.split("|")]
    found += [cell for cell in cells if re.fullmatch(r"[\d,.]+", cell)]
    return {one for one in found if len(re.sub(r"\D", "", one).strip("0")) >= 3}


def test_no_figure_stands_in_two_documents():
    """Medians in the tables of all workloads are the source of ratios; a figure itself has one place."""
    where: dict[str, list[str]] = {}
    for document in DOCUMENTS:
        for figure in figures(text_of(document)):
            where.setdefault(figure, []).append(document.relative_to(ROOT).as_posix())
    assert not {figure: names for figure, names in where.items() if len(names) > 1}


def test_the_performance_document_is_what_the_bench_writes():
    newest = max((ROOT / "tests/bench/results").glob("*.json"))
    program = (
        "import json, sys, pathlib; sys.path.insert(0, 'tests/bench'); import report; "
        "path = pathlib.Path(sys.argv[1]); "
        "results = json.loads(path.read_text()); text = report.DOCUMENT.read_text(); "
        "json.dump([report.with_summary(text, report.summary(results, path.name)), "
        "report.page(results, path.name)], sys.stdout)"
    )
    command = [sys.executable, "-c", program, str(newest)]
    written = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout)
    assert written == [text_of(ROOT / "docs/performance.md"), text_of(ROOT / "tests/bench/results/README.md")]


def test_the_maintainer_is_named_in_one_place():
    """Everything else refers to it: packages, repositories, wheel and security contact."""
    (maintainer,) = tomllib.loads(text_of(ROOT / "pyproject.toml"))["project"]["maintainers"]
    below = [path for name in TOP for path in (ROOT / name).rglob("*") if path.is_file()]
    files = [path for path in (*DOCUMENTS, ROOT / "Makefile", *below) if "__pycache__" not in path.parts]
    assert not [path for path in files if maintainer["email"].encode() in path.read_bytes()]
    assert "`maintainers` in `pyproject.toml`" in text_of(ROOT / "SECURITY.md")


def test_no_test_name_is_longer_than_60_characters():
    assert not [name for name in sorted(names_of_tests()) if len(name) > LONGEST_TEST_NAME]
