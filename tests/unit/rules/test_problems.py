"""problems.py: a problem as lines for people, and as one line for a log record."""

from pathlib import Path

from cnprocd.rules.problems import Problem


def test_a_problem_in_a_record_is_one_line():
    """Neither its caret nor a line end in a text of the file comes into the record."""
    one = Problem(Path("rules.yaml"), 3, 5, "unknown unit", "a unit", "add .service", "  unit: x")
    assert one.sentence == "rules.yaml:3:5: unknown unit (add .service)"
    assert "\n" in one.render()
    hostile = Problem(Path("rules.yaml"), 0, 0, "a\nb\x1b[2J", hint="c\r\nd")
    assert hostile.sentence.isprintable()
