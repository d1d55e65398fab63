"""A long answer is encoded in pieces between turns of the loop, and refused before more is read than may be sent."""

import asyncio
import json

import pytest
from unit.hookkit import Records

from cnprocd.control.protocol import MAX_MESSAGE, Decoder, EncodedReply, ProtocolError, Reply, pack, to_reply
from cnprocd.control.verbs import EncodedValues
from cnprocd.spool import spool_file
from cnprocd.spool.disk import DirectDisk
from cnprocd.spool.disk_messages import FindJobs, FindMatches
from cnprocd.spool.job import Job, JobRequest
from cnprocd.spool.rows import MatchFilter, PastMatch
from cnprocd.spool.spool import Spool


class CountingDisk(DirectDisk):
    """Counts the pages that are read."""

    def __init__(self) -> None:
        super().__init__()
        self.pages: list[int] = []
        self.jobs: list[tuple[Job, ...]] = []

    def send(self, request, done):
        def answered(answer):
            if isinstance(request, FindJobs):
                self.jobs.append(answer.jobs)
            if isinstance(request, FindMatches):
                self.pages.append(sum(len(json.dumps(match.record)) for match in answer.matches))
            done(answer)

        super().send(request, answered)


@pytest.fixture
def disk():
    return CountingDisk()


@pytest.fixture
def history_of(tmp_path, disk):
    """Return a function that makes a history, and returns a spool on it."""
    made = []

    def make(count, record_bytes):
        spool = Spool.open(tmp_path, log=Records(), disk=disk)
        made.append(spool)
        rows = [PastMatch(n, "r", "c", n, {"rule": "r", "n": n, "cmdline": "x" * record_bytes}) for n in range(count)]
        spool.record_matches(rows)
        return spool

    yield make
    for spool in made:
        spool.close()


def test_an_encoded_reply_is_a_reply_for_the_client():
    decoder = Decoder()
    decoder.feed(pack(EncodedReply("jobs", ('{"a":"\\u00e9"}', "1"), 'a "note"')) + pack(EncodedReply("jobs", ())))
    replies = [to_reply(value) for value in (decoder.next(), decoder.next()) if value is not None]
    assert replies == [Reply({"jobs": [{"a": "é"}, 1], "note": 'a "note"'}), Reply({"jobs": []})]


def test_pages_are_bounded_in_bytes_and_lose_no_match(history_of, disk):
    spool = history_of(250, 20_000)
    found = asyncio.run(spool.find_matches(MatchFilter(limit=240)))
    assert [match.record["n"] for match in found.value] == list(range(249, 9, -1))
    assert found.why is None
    assert max(disk.pages) < spool_file.PAGE_BYTES + 25_000


def test_jobs_are_read_in_pages(history_of, disk):
    spool = history_of(0, 0)
    spool.enqueue([JobRequest(key=str(n), rule="a" if n % 2 else "b", event={"pid": n}) for n in range(500)])
    found = asyncio.run(spool.find_jobs(limit=420))
    assert [job.job_id for job in found.value] == list(range(500, 80, -1))
    assert [len(page) for page in disk.jobs] == [100, 100, 100, 100, 20]
    assert len(asyncio.run(spool.find_jobs(rule="a", limit=1000)).value) == 250


def test_a_too_long_answer_is_refused_before_it_is_read(history_of, disk):
    """18 MB are asked for: little more than the limit of a message is read."""
    spool = history_of(1000, 18_000)

    async def ask():
        encoded = EncodedValues()
        async for page in spool.match_pages(MatchFilter(limit=1000)):
            await encoded.add(dict(match.record) for match in page.value)

    with pytest.raises(ProtocolError, match="the limit of a message"):
        asyncio.run(ask())
    assert sum(disk.pages) < MAX_MESSAGE + 2 * spool_file.PAGE_BYTES


def test_the_loop_turns_while_an_answer_is_encoded():
    async def encode_and_count():
        turns = 0

        def turn():
            nonlocal turns
            turns += 1
            loop.call_soon(turn)

        loop = asyncio.get_running_loop()
        loop.call_soon(turn)
        await EncodedValues().add({"cmdline": "x" * 10_000} for _ in range(90))
        return turns

    assert asyncio.run(encode_and_count()) >= 10
