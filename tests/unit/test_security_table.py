"""The README's security table names a test for every line; every one of them must exist."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
SECTION = (TESTS.parent / "README.md").read_text(encoding="utf-8").partition("\n## Security\n")[2].partition("\n## ")[0]
ROWS = [line.split(" | ") for line in SECTION.splitlines() if line.startswith("| ")][1:]


def test_every_line_of_the_security_table_names_tests_that_exist():
    there = {
        node.name
        for path in TESTS.rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert len(ROWS) > 40
    for row in ROWS:
        assert len(row) == 3, row
        named = re.findall(r"`(test_\w+)`", row[2])
        assert named, row
        assert set(named) <= there, set(named) - there
