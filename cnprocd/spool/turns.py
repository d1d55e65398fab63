"""Whose turn it is: fair turns between rules, and between the serialisation keys of a rule. PURE.

Between rules: the rule with the fewest running hooks is next; of several, the one that started a hook longest ago. So
rules with waiting jobs share the slots equally, however many jobs each has, and a rule whose first job comes waits for
one slot at most.

`slots:` of a rule is both its limit and its guarantee: so many slots are kept free for it, except that rules without
`slots:` always have one slot among them. If the wishes exceed `hook_slots`, each rule is given one slot in the order of
the file, then a second, until none is left.

Between keys: a key that has just started goes behind the jobs that were waiting at that moment. A new key does not pass
them, so a process that makes new keys all the time delays no other.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping

from cnprocd.rules.ruleset import Rule
from cnprocd.spool.job import Job

MOST_REMEMBERED = 4096
KEYS_COMPARED = 32  # of the oldest jobs, each of another key


def guaranteed_slots(rules: Iterable[Rule], total: int) -> dict[str, int]:
    """Return how many of the `total` slots are kept free for each rule with `slots:`."""
    hooks = [(rule.name, rule.run.slots) for rule in rules if rule.enabled and rule.run is not None]
    wanted = {name: slots for name, slots in hooks if slots is not None}
    left = total - (len(wanted) < len(hooks))
    given = dict.fromkeys(wanted, 0)
    while left > 0 and given != wanted:
        for name in [name for name in wanted if given[name] < wanted[name]][:left]:
            given[name] += 1
            left -= 1
    return given


def may_start(
    rule: str, running: Mapping[str, int], *, limit: int | None, total: int, guaranteed: Mapping[str, int]
) -> bool:
    """Whether a hook of `rule` may start: below its limit, and not in a slot that is kept free for another rule."""
    if limit is not None and running.get(rule, 0) >= limit:
        return False
    kept = sum(max(0, count - running.get(other, 0)) for other, count in guaranteed.items() if other != rule)
    return sum(running.values()) + kept < total or running.get(rule, 0) < guaranteed.get(rule, 0)


class Turns:
    """Remembers the last start of each rule and key. What started longest ago is forgotten, and counts as new."""

    def __init__(self) -> None:
        self._starts = 0
        self._rules: OrderedDict[str, int] = OrderedDict()
        self._keys: OrderedDict[str, tuple[int, int]] = OrderedDict()

    def note_start(self, job: Job, last_job_id: int) -> None:
        """Note that a hook starts. `last_job_id` is the highest job id given until now."""
        self._starts += 1
        self._rules[job.rule] = self._starts
        self._rules.move_to_end(job.rule)
        if job.serialize_key is not None:
            self._keys[job.serialize_key] = (last_job_id, self._starts)
            self._keys.move_to_end(job.serialize_key)
        for starts in (self._rules, self._keys):
            if len(starts) > MOST_REMEMBERED:
                starts.popitem(last=False)

    def order(self, oldest: Mapping[str, int], running: Mapping[str, int]) -> list[str]:
        """Return the rules of `oldest`, which has the oldest waiting job of each, in the order of their turns."""
        return sorted(oldest, key=lambda rule: (running.get(rule, 0), self._rules.get(rule, 0), oldest[rule]))

    def of_key(self, job: Job) -> tuple[int, int]:
        """Return the turn of the oldest job of a key: the lowest is next."""
        marker, start = self._keys.get(job.serialize_key or "", (0, 0))
        return (max(job.job_id, marker), start)

    def is_first(self, job: Job) -> bool:
        """Whether no younger job can have an earlier turn than this one."""
        return self.of_key(job)[0] == job.job_id
