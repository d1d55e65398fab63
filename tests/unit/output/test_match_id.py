"""The id of a match: equal for every report of one match, and different for any two matches."""

from dataclasses import replace

import pytest

from cnprocd.cli.ruleset import rule_of_match
from cnprocd.connector.taskrecord import TaskRecord
from cnprocd.output.match_id import Machine, match_id
from cnprocd.output.record import MATCH_FIELDS, match_record
from cnprocd.process.model import Occurrence, Process
from cnprocd.rules.compile import Matcher

BOOT, OTHER_BOOT = "a" * 32, "b" * 32
RECORD = TaskRecord(7, 7, 1, 256, True, False, "worker", 0, 0, 1_700_000_000, 81_000, 0, 0, 0, 0, 0, 0, 0, 0)


def matches_of(kernel_time_ns=5, rule="r", tgid=7, events=("nonzero_exit",), threads=False, usage=None, start_ns=3):
    process = Process(tgid, 1, start_ns, comm="worker")
    occurrence = Occurrence("exit", process, 8, 256, kernel_time_ns, usage=usage, of_thread=threads)
    loaded = replace(rule_of_match(None, events), name=rule, threads=threads)
    return Matcher([loaded]).match(occurrence)


def id_of(boot=BOOT, unique="u", **fields):
    (match,) = matches_of(**fields)
    return match_id(boot, match, unique)


@pytest.mark.parametrize(
    "fields",
    [
        {"start_ns": None},  # the next daemon did not see the fork
        {"usage": RECORD},  # one daemon read the exit record, the other one did not
        {"unique": "of another daemon"},
    ],
)
def test_a_match_that_is_reported_again_has_the_same_id(fields):
    assert id_of(**fields) == id_of()


def test_a_recovered_exit_keeps_the_id_of_its_exit_record():
    """kill -9 between the report and the end of the batch: the next daemon reads the record again, and no fork."""
    first = id_of(kernel_time_ns=None, usage=RECORD, start_ns=3, unique="one")
    assert id_of(kernel_time_ns=None, usage=RECORD, start_ns=None, unique="other") == first
    later = RECORD._replace(lifetime_us=81_001)
    assert id_of(kernel_time_ns=None, usage=later, start_ns=3) != first


def test_matches_that_differ_in_anything_have_different_ids():
    found = [
        id_of(),
        id_of(boot=OTHER_BOOT),
        id_of(kernel_time_ns=6),
        id_of(rule="r2"),
        id_of(tgid=8),
        id_of(events=("exit",)),
        id_of(threads=True),
        id_of(kernel_time_ns=None),
        id_of(kernel_time_ns=None, start_ns=4),
        id_of(kernel_time_ns=None, start_ns=None),
        id_of(kernel_time_ns=None, start_ns=None, unique="v"),
        id_of(kernel_time_ns=None, usage=RECORD),
    ]
    assert len(set(found)) == len(found)
    assert all(len(one) == 32 and int(one, 16) >= 0 for one in found)


def test_a_record_names_the_match_and_its_machine():
    machine = Machine("db1", "5" * 32, BOOT)
    (match,) = matches_of()
    record = match_record(match, machine=machine)
    assert (record["match_id"], record["host"]) == (id_of(), "db1")
    assert (record["machine_id"], record["boot_id"]) == ("5" * 32, BOOT)
    assert list(record)[: len(MATCH_FIELDS)] == list(MATCH_FIELDS)
    elsewhere = match_record(match)
    assert [elsewhere[name] for name in ("match_id", "host", "machine_id", "boot_id")] == [None] * 4


def test_a_name_that_is_no_utf8_has_an_id():
    (match,) = matches_of()
    odd = match._replace(rule=replace(match.rule, rule=replace(match.rule.rule, name="\udcff")))
    assert len(match_id(BOOT, odd, "")) == 32
