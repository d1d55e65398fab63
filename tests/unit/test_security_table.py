"""The threat model names a test for every attack and fault; each of these tests must exist."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
DOCUMENT = (TESTS.parent / "docs/threat-model.md").read_text(encoding="utf-8")
ROWS = [line.split(" | ") for line in DOCUMENT.partition("\n## Tests\n")[2].splitlines() if line.startswith("| ")][1:]


def test_every_line_of_the_threat_model_names_existing_tests():
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
