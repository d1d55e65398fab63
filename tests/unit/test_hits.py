"""The hits of rules over restarts of the daemon."""

import pytest
from unit.hookkit import Records

from cnprocd.counts import Counts
from cnprocd.hits import Hits
from cnprocd.spool.history import COUNTING_SINCE
from cnprocd.spool.rows import RuleHits
from cnprocd.spool.spool import Spool


@pytest.fixture
def spool(tmp_path):
    spool = Spool.open(tmp_path, log=Records())
    yield spool
    spool.close()


def hit(counts, rule, at_ns):
    counts.rules[rule] += 1
    counts.rule_last_ns[rule] = at_ns


def test_hits_of_a_former_run_are_counted_on(spool):
    first = Counts()
    hits = Hits(first, spool)
    for at_ns in (5, 7):
        hit(first, "a", at_ns)
    hits.store()
    second = Counts()
    again = Hits(second, spool)
    assert (again.since_ns, second.rules["a"], second.rule_last_ns["a"]) == (hits.since_ns, 2, 7)
    hit(second, "a", 9)
    again.store()
    assert spool.hits() == {COUNTING_SINCE: RuleHits(0, hits.since_ns), "a": RuleHits(3, 9)}


def test_only_rules_that_matched_are_stored(spool, monkeypatch):
    counts = Counts()
    hits = Hits(counts, spool)
    stored = []
    monkeypatch.setattr(spool, "put_hits", lambda found, gone=(): stored.append(dict(found)))
    hits.store()
    hit(counts, "a", 1)
    hits.store()
    hits.store()
    assert stored == [{"a": RuleHits(1, 1)}]


def test_a_clean_stop_stores_all_rules_again(spool):
    """The database may have been replaced since: what it held of other rules went with it."""
    counts = Counts()
    hits = Hits(counts, spool)
    hit(counts, "a", 1)
    hits.store()
    spool.put_hits({}, ["a", COUNTING_SINCE])
    hits.store_all()
    assert spool.hits() == {COUNTING_SINCE: RuleHits(0, hits.since_ns), "a": RuleHits(1, 1)}


def test_rules_that_are_gone_are_forgotten(spool):
    counts = Counts()
    hits = Hits(counts, spool)
    for rule in ("a", "b"):
        hit(counts, rule, 1)
    hits.store()
    hits.forget_others({"b", "c"})
    assert set(spool.hits()) == {COUNTING_SINCE, "b"}
    assert set(counts.rules) == {"b"}
