"""The schedule of one random run: which processes fail, and what is done to cnprocd meanwhile. PURE.

One seed gives one schedule. Instants within a step are random as well (`pause_s`), but what the daemon does at that
instant depends on the machine.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

# Name of a rule -> names of the processes that match it. "cnpj" stands for a prefix of 6 characters, another in each
# run (world.py), so that runs beside each other do not match processes of the other.
KINDS = {
    "plain": ("cnpj-plain",),
    "again": ("cnpj-again",),  # its hook fails at the first attempt
    "keyed": ("cnpj-k0", "cnpj-k1", "cnpj-k2"),  # serialize: comm
    "whole": ("cnpj-w0", "cnpj-w1"),  # serialize: rule
    "slow": ("cnpj-slow",),
    "gathered": ("cnpj-g0", "cnpj-g1"),  # coalesce
}
FLOOD = "flood"
FLOOD_COMM = "cnpj-flood"
FLOOD_SIZE = 300
MARK = "mark"  # its match follows those of all processes that failed before
MARK_COMM = "cnpj-mark"
QUEUE_LIMIT = 260  # the flood reaches it; the share of each of the other rules is not reached

BOTH = (
    "kill_daemon", "kill_daemon", "kill_daemon", "stop_daemon", "kill_spool", "reload_good", "reload_bad", "typo",
    "truncate", "remove_rule", "lock_spool", "freeze_disk", "freeze_disk_and_kill", "fill_disk_and_kill", "clock_step",
    "clock_step_and_kill", "flood", "overrun",
)  # fmt: skip
APART = ("kill_runner", "kill_runner", "kill_both", "stop_runner", "stop_runner")
CLOCKS_S = (-30 * 86400, -3600, 0, 3600, 30 * 86400)
SLOW = ("kill_spool", "lock_spool", "freeze_disk_and_kill", "fill_disk_and_kill")  # may take 30 s, as "fill_disk"
MOST_IN_A_GAP = 8  # processes that fail while a service is down


@dataclass(frozen=True, slots=True)
class Fail:
    """A process of this name fails. `slow_s` is what its hook takes."""

    rule: str
    comm: str


@dataclass(frozen=True, slots=True)
class Disturb:
    """Something is done to cnprocd. `gap` fails in the middle of it; `pause_s` is a random instant.

    `clock_s`: by how much the wall clock is wrong from then on, if `what` is a clock step.
    """

    what: str
    pause_s: float
    clock_s: int
    gap: tuple[Fail, ...]


@dataclass(frozen=True, slots=True)
class Schedule:
    """One run. `apart`: hooks run in the runner."""

    seed: int
    apart: bool
    steps: tuple[Fail | Disturb, ...]


def make(seed: int, failures: int, disturbances: int, *, quick: bool = False) -> Schedule:
    """Return the schedule of a seed. A `quick` one never waits for the next try of a failed disk, up to 30 s."""
    chance = random.Random(seed)
    apart = chance.random() < 0.5
    choices = [what for what in BOTH + (APART if apart else ()) if not (quick and what in SLOW)]
    chosen = [chance.choice(choices) for _ in range(disturbances)]
    if not quick:
        chosen.append("fill_disk")
    steps: list[Fail | Disturb] = [_fail(chance) for _ in range(failures)]
    for what in chosen:
        gap = tuple(_fail(chance) for _ in range(chance.randrange(MOST_IN_A_GAP)))
        place = chance.randrange(len(steps) + 1)
        steps.insert(place, Disturb(what, chance.random() ** 2 * 0.2, chance.choice(CLOCKS_S), gap))
    return Schedule(seed, apart, tuple(steps))


def _fail(chance: random.Random) -> Fail:
    rule = chance.choice(tuple(KINDS))
    return Fail(rule, chance.choice(KINDS[rule]))


def rules(hook: str, journal: str, version: int, *, without: str | None = None) -> str:
    """Return the text of the rule file. `hook` is the path of the script; `version` makes each text another one."""
    env = f"env: {{JOURNAL: {journal}}}, timeout: 60s"
    more = {
        "plain": "",
        "again": ", retries: 5, backoff: {initial: 100ms, max: 200ms}",
        "keyed": ", serialize: comm",
        "whole": ", serialize: rule",
        "slow": "",
        "gathered": "",
    }
    limits = {"gathered": "\n    coalesce: {window: 300ms, max: 5, by: comm}"}
    takes_s = {"slow": "0.4", "keyed": "0.02"}
    text = f"# version {version}\nsettings: {{hook_slots: 4, queue_limit: {QUEUE_LIMIT}, receive_buffer: 8M}}\nrules:\n"
    for rule, comms in KINDS.items():
        if rule == without:
            continue
        text += f"  - name: {rule}\n    events: [nonzero_exit]\n    match: {{comm: [{', '.join(comms)}]}}"
        text += f"{limits.get(rule, '')}\n"
        text += f'    run: {{command: [{hook}, {rule}, "{takes_s.get(rule, "0")}"], {env}{more[rule]}}}\n'
    text += f"  - name: {FLOOD}\n    events: [nonzero_exit]\n    match: {{comm: {FLOOD_COMM}}}\n"
    text += f'    run: {{command: [{hook}, {FLOOD}, "0"], {env}, slots: 2}}\n'
    text += f"  - name: {MARK}\n    events: [nonzero_exit]\n    match: {{comm: {MARK_COMM}}}\n"
    text += f'    run: {{command: [{hook}, {MARK}, "0"], {env}}}\n'
    return text
