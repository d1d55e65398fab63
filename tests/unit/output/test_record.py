"""The message of a match record."""

import pytest

from cnprocd.output.record import message
from cnprocd.rules.language.syntax import template

RECORD = {"rule": "oracle-died", "kind": "exit", "comm": "ora_pmon", "pid": 7, "recovered": False}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"status": "exit code 3"}, "oracle-died: ora_pmon[7] ended: exit code 3"),
        (
            {"status": "unknown exit status", "recovered": True},
            "oracle-died: ora_pmon[7] vanished unseen: unknown exit status",
        ),
        ({"kind": "exec"}, "oracle-died: ora_pmon[7]: exec"),
        ({"kind": "exec", "comm": None}, "oracle-died: unknown[7]: exec"),
    ],
)
def test_the_default_message_names_the_rule(changes, expected):
    assert message(None, RECORD | changes) == expected


def test_a_message_of_the_rule_replaces_the_default():
    assert message(template("{comm} is gone"), RECORD) == "ora_pmon is gone"
