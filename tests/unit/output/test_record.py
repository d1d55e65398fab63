"""The message of a match record."""

import pytest

from cnprocd.output.record import match_record, message
from cnprocd.process.model import Image, Occurrence, Process
from cnprocd.rules.compile import Match, compile_rule
from cnprocd.rules.language.plain import plain
from cnprocd.rules.language.schema import RuleModel
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


HOSTILE = "a\n\x1b[31mb\udcff\u202ec"


def texts_of(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [text for one in value for text in texts_of(one)]
    return [value] if isinstance(value, str) else []


def test_every_text_of_a_record_is_escaped_alike():
    """Names, paths, arguments, cgroup, unit, user's unit, container, pod and ancestors, each chosen by a process."""
    above = Process(2, 1, comm=HOSTILE)
    process = Process(3, 2, comm=HOSTILE, exe=f"/{HOSTILE}", cmdline=HOSTILE, uid=0, gid=0)
    process.image = Image(f"/claimed{HOSTILE}")
    process.cgroup = f"/user.slice/user@1.service/app.slice/{HOSTILE}.service/lxc.payload.{HOSTILE}"
    rule = plain(RuleModel.model_validate({"name": "r", "events": "exit"}))
    match = Match(compile_rule(rule, 0), Occurrence("exit", process, 3, 0, ancestors=(above, Process(1, 0))), "exit")
    record = match_record(match)
    names = ("comm", "exe", "exe_claimed", "cmdline", "cgroup", "container", "parent_comm", "ancestors")
    assert all(record[name] for name in names)
    for text in texts_of(record):
        assert text.isprintable(), text
    exact = {name: bytes.fromhex(record[f"{name}_hex"]) for name in names if f"{name}_hex" in record}
    assert exact.keys() == set(names) - {"ancestors"}
    assert all(HOSTILE.encode("utf-8", "surrogateescape") in raw for raw in exact.values())
    assert bytes.fromhex(record["ancestors"][0]["comm_hex"]) == HOSTILE.encode("utf-8", "surrogateescape")
    rendered = message(template("{" + "} {".join(names) + "}"), record)
    assert rendered.isprintable()
