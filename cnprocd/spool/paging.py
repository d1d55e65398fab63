"""Search the spool's file page by page, so that no message is long, and fall back to the memory if it has no answer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import TypeVar

from cnprocd.spool import disk_messages as m
from cnprocd.spool.job import Job
from cnprocd.spool.rows import CountFilter, Found, MatchCount, NotInHistoryError, PastMatch

T = TypeVar("T")
Find = Callable[[m.Query], Awaitable[m.Answer]]


def job_pages(find: Find, query: m.FindJobs, in_memory: Callable[[], list[Job]]) -> AsyncIterator[Found[list[Job]]]:
    """Yield jobs, newest first. The last page may be empty."""

    def query_of(found: int, following: int) -> m.Query:
        return replace(query, limit=query.limit - found, before=following)

    return _pages(find, query_of, query.limit, lambda page: page.jobs, in_memory)


def match_pages(
    find: Find, query: m.FindMatches, in_memory: Callable[[], list[PastMatch]]
) -> AsyncIterator[Found[list[PastMatch]]]:
    """Yield past matches. The last page may be empty. Raises NotInHistoryError."""
    wanted = query.wanted

    def query_of(found: int, following: int) -> m.Query:
        return m.FindMatches(replace(wanted, limit=wanted.limit - found), following)

    def rows_of(page: m.Page) -> tuple[PastMatch, ...]:
        if not page.knows_after:
            raise NotInHistoryError(wanted.after or wanted.before)
        return page.matches

    return _pages(find, query_of, wanted.limit, rows_of, in_memory)


async def _pages(
    find: Find,
    query_of: Callable[[int, int], m.Query],
    limit: int,
    rows_of: Callable[[m.Page], tuple[T, ...]],
    in_memory: Callable[[], list[T]],
) -> AsyncIterator[Found[list[T]]]:
    found = following = 0
    while True:
        page = await find(query_of(found, following))
        if not isinstance(page, m.Page):
            break
        rows, following = rows_of(page), page.following
        found += len(rows)
        yield Found(list(rows))
        if not following or found >= limit:
            return
    known = [] if found or isinstance(page, m.Unanswerable) else in_memory()
    yield Found(known, m.reason_of(page))


async def count_matches(
    find: Find, wanted: CountFilter, in_memory: Callable[[], tuple[MatchCount, ...]]
) -> Found[tuple[MatchCount, ...]]:
    """Return how many past matches there were in each period: one short answer."""
    found = await find(m.CountMatches(wanted))
    return Found(found.counts) if isinstance(found, m.Counted) else Found(in_memory(), m.reason_of(found))
