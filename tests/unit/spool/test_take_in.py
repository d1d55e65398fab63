"""Jobs of the file are taken into the memory, where events of theirs may have been seen again meanwhile.

The disk is frozen when a daemon starts after kill -9. It evaluates the events that were in flight again, before it
knows of their jobs in the file. Each event has one job in the end, which runs.
"""

from unit.spool.test_spool import request

from cnprocd.spool import database
from cnprocd.spool.job import State
from cnprocd.spool.rows import Rows
from cnprocd.spool.store import Store

NOW = 10**18


def store(*keys, first_id=1):
    """A store with a job for each key."""
    made = Store(database.in_memory())
    made.skip_ids(first_id - 1)
    made.enqueue([request("r", key=key) for key in keys], boot_id="boot", now_ns=NOW, queue_limit=100)
    return made


def jobs(of):
    """Return the live jobs with the number of events that they claim, and the keys that they have."""
    rows = of.rows(State.WAITING, State.RUNNING)
    keys = {job: [key for owner, key, _ in rows.events if owner == job] for job, *_ in rows.jobs}
    return {row[0]: (row[2], row[10], keys[row[0]]) for row in rows.jobs}


def test_a_job_that_has_not_started_gives_way():
    memory, file = store("a", "b", first_id=100), store("a")
    assert memory.take_in(file.rows(State.WAITING)) == ()
    assert jobs(memory) == {1: ("waiting", 1, ["a"]), 101: ("waiting", 1, ["b"])}
    assert memory.waiting == 2


def test_a_job_that_has_not_started_gives_way_to_a_handled_event():
    memory = store("a", "b", first_id=100)
    memory.take_in(Rows(), keys=["a"])
    assert jobs(memory) == {101: ("waiting", 1, ["b"])}
    assert memory.enqueue([request("r", key="a")], boot_id="boot", now_ns=NOW, queue_limit=9).duplicates == 1


def test_beside_a_job_that_runs_the_one_of_the_file_is_left_out():
    """Its hook would run twice. Without events it would be a dead job whose record cannot be read."""
    memory, file = store("a", first_id=100), store("a", "b")
    memory.start(100, "attempt", "boot")
    assert memory.take_in(file.rows(State.WAITING)) == (1,)
    assert jobs(memory) == {2: ("waiting", 1, ["b"]), 100: ("running", 1, ["a"])}


def test_the_file_gives_an_event_to_the_job_of_the_memory():
    """Else the job of the memory would have no event in the file, and be lost by the next kill."""
    memory, file = store("a", first_id=100), store("a")
    memory.start(100, "attempt", "boot")
    file.write(memory.rows(State.RUNNING), (), ())
    assert jobs(file)[100] == ("running", 1, ["a"])


def test_a_job_that_is_taken_in_again_stays_one_job():
    memory = store("a")
    memory.take_in(memory.rows(State.WAITING))
    assert jobs(memory) == {1: ("waiting", 1, ["a"])}
