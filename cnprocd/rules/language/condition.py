"""`match:` of a rule: what must hold of an event and of its process, as a tree of frozen models.

Strategy: every key of a mapping must hold (and), a list within a key means any of its items (or). A key about how the
process ended holds only for an exit; `never_matches` finds the trees that no event of a rule can satisfy, because a
rule that silently never fires is the worst mistake a rule file can hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from cnprocd.rules.language.fields import (
    CommPatterns,
    ExitCodes,
    Flag,
    Groups,
    Model,
    OneAsList,
    OneOrListOf,
    PathPatterns,
    SignalSet,
    SizeComparison,
    TextPatterns,
    TimeComparison,
    Users,
    words,
)
from cnprocd.rules.language.mistakes import Mistake, mistake
from cnprocd.rules.ruleset import EXIT_EVENTS, EventName

ExitStatus = Annotated[Literal["unknown", "known"], *words("unknown", "known")]

# The keys that speak of an end, by their YAML names (which are their attribute names too).
EXIT_KEYS = ("exit_code", "signal", "core_dumped", "exit_status", "lifetime", "max_rss", "cpu_time")


class _Identity(Model):
    """The keys that say who a process is. Every given key must hold."""

    comm: CommPatterns | None = Field(
        default=None,
        description="The command name: what the kernel keeps of it, at most 15 bytes. Any of the patterns.",
    )
    exe: PathPatterns | None = Field(default=None, description="The path of the executable. Any of the patterns.")
    cmdline: TextPatterns | None = Field(
        default=None, description="The arguments, joined by single spaces. Any of the patterns."
    )
    cgroup: PathPatterns | None = Field(
        default=None, description='The control group path (v2), from its root "/". Any of the patterns.'
    )
    unit: TextPatterns | None = Field(
        default=None, description='The systemd unit, like "nginx.service". Any of the patterns.'
    )
    user: Users | None = Field(default=None, description="The user: name or number; any of them.")
    group: Groups | None = Field(default=None, description="The primary group: name or number; any of them.")
    parent: ProcessConditionModel | None = Field(default=None, description="What must hold of the parent process.")
    ancestor: ProcessConditionModel | None = Field(
        default=None, description="What must hold of the parent, or of its parent, and so on up."
    )

    @model_validator(mode="after")
    def _not_empty(self) -> _Identity:
        if not self.model_fields_set:
            raise mistake(
                "the match is empty", "at least one key: " + ", ".join(keys_of(type(self))), "leave it out to match all"
            )
        return self


class ProcessConditionModel(_Identity):
    """What must hold of a related process: its identity."""

    not_: Annotated[tuple[ProcessConditionModel, ...], OneAsList, OneOrListOf()] = Field(
        default=(), alias="not", min_length=1, description="None of these may hold: one match or a list."
    )
    any: tuple[ProcessConditionModel, ...] = Field(
        default=(), min_length=1, description="At least one of these must hold."
    )
    all: tuple[ProcessConditionModel, ...] = Field(
        default=(), min_length=1, description="Every one of these must hold."
    )


class ConditionModel(_Identity):
    """What must hold of an event and its process.

    `exit_code` and `signal` given together in one mapping mean either. An attribute that is not known does not match,
    neither plainly nor under `not`.
    """

    exit_code: ExitCodes | None = Field(
        default=None, description='The exit code: 3, "!= 0", "> 3", "1-127", or a list. With signal: either.'
    )
    signal: SignalSet | None = Field(
        default=None, description='The signal that killed it: SIGKILL, 9, "any", or a list. With exit_code: either.'
    )
    core_dumped: Flag | None = Field(default=None, description="Whether it left a core dump.")
    exit_status: ExitStatus | None = Field(
        default=None, description="unknown: it vanished while events were lost; known: the kernel reported its end."
    )
    lifetime: TimeComparison | None = Field(
        default=None, description='From start to end of the process: "< 5s" finds what dies young.'
    )
    max_rss: SizeComparison | None = Field(default=None, description='Peak resident memory: "> 500M".')
    cpu_time: TimeComparison | None = Field(default=None, description='User and system CPU time together: "> 10s".')
    not_: Annotated[tuple[ConditionModel, ...], OneAsList, OneOrListOf()] = Field(
        default=(), alias="not", min_length=1, description="None of these may hold: one match or a list."
    )
    any: tuple[ConditionModel, ...] = Field(default=(), min_length=1, description="At least one of these must hold.")
    all: tuple[ConditionModel, ...] = Field(default=(), min_length=1, description="Every one of these must hold.")

    @model_validator(mode="after")
    def _no_contradiction(self) -> ConditionModel:
        given = [key for key in ("exit_code", "signal", "core_dumped") if key in self.model_fields_set]
        if self.exit_status == "unknown" and given:
            raise mistake(
                f"{given[0]} can never hold together with exit_status: unknown",
                hint="an unknown status has no code, signal or core flag; use an any: list for either",
                key=given[0],
            )
        return self


def keys_of(model: type[Model]) -> list[str]:
    """The keys of a model as a rule file writes them."""
    return [info.alias or name for name, info in model.model_fields.items()]


def never_matches(condition: ConditionModel, events: tuple[EventName, ...]) -> Iterator[Mistake]:
    """The mistakes of a match that no event among `events` can satisfy, each at its key."""
    if EXIT_EVENTS.isdisjoint(events):
        for path in _exit_keys(condition):
            yield Mistake(
                f"{path[-1]} is only known when a process ends, and the rule has no such event",
                hint="add nonzero_exit or exit to events",
                at=path,
                on_key=True,
            )
    elif "exit" not in events:
        for path, part in _required(condition):
            if part.exit_code is not None and part.exit_code.ranges == ((0, 0),) and part.signal is None:
                yield Mistake(
                    "exit code 0 never comes with a nonzero_exit event",
                    hint="use events: [exit] for successful exits",
                    at=(*path, "exit_code"),
                )


def _exit_keys(condition: ConditionModel) -> Iterator[tuple[str | int, ...]]:
    """The paths of the keys that need an exit event, anywhere in the tree."""
    yield from ((key,) for key in EXIT_KEYS if key in condition.model_fields_set)
    for name, branch in (("not", condition.not_), ("any", condition.any), ("all", condition.all)):
        for index, child in enumerate(branch):
            yield from ((name, index, *path) for path in _exit_keys(child))


def _required(condition: ConditionModel) -> Iterator[tuple[tuple[str | int, ...], ConditionModel]]:
    """The parts of the tree that every matching event must satisfy: itself and what stands under `all`."""
    yield (), condition
    for index, child in enumerate(condition.all):
        yield from ((("all", index, *path), part) for path, part in _required(child))


ProcessConditionModel.model_rebuild()
ConditionModel.model_rebuild()
