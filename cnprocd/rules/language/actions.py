"""The actions of a rule: `log:` writes a record, `run:` runs a hook. PURE.

Event data is never a command. The program is a literal absolute path, and there is no shell. If the program itself is a
shell, text that a process chooses cannot become part of the script.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, PlainValidator, model_validator

from cnprocd.log import LEVELS
from cnprocd.log import Level as LogLevel
from cnprocd.rules.language import syntax
from cnprocd.rules.language.fields import (
    Duration,
    Group,
    Model,
    Nice,
    OutputSize,
    ResourceCount,
    Retries,
    Size,
    Slots,
    TemplateText,
    Umask,
    User,
    YamlForm,
    words,
)
from cnprocd.rules.language.value_problem import InvalidValueError, ValueProblem, invalid, shown
from cnprocd.rules.values import FREE_TEXT_FIELDS, Template

Level = Annotated[LogLevel, *words(*LEVELS)]


class LogModel(Model):
    """The log record of a match."""

    level: Level = Field(default="notice", description="The severity of the record.")
    message: TemplateText | None = Field(
        default=None, description='The message, with event fields: "{comm}[{pid}] died of {status}".'
    )


class BackoffModel(Model):
    """The pauses between attempts: from `initial`, doubled each time, up to `max`."""

    initial_s: Duration = Field(
        default="1s",
        validate_default=True,
        alias="initial",
        description="The longest pause after the first failed attempt. A pause is random, between a tenth of this and "
        "all of it, so that jobs that failed together do not return together.",
    )
    max_s: Duration = Field(
        default="5m",
        validate_default=True,
        alias="max",
        description="The longest pause of all. It doubles with each failed attempt until then.",
    )

    @model_validator(mode="after")
    def _grows(self) -> BackoffModel:
        if self.initial_s > self.max_s:
            raise invalid(
                "the first pause is longer than the longest pause", "an initial of at most max", key="initial"
            )
        return self


class ResourceLimitsModel(Model):
    """Resource limits of the hook (setrlimit(2))."""

    open_files: ResourceCount | None = Field(
        default=None, description="Number of open file descriptors (RLIMIT_NOFILE)."
    )
    processes: ResourceCount | None = Field(
        default=None, description="Number of processes of the hook's user in total (RLIMIT_NPROC)."
    )
    address_space_bytes: Size | None = Field(
        default=None, alias="address_space", description="Virtual memory of each process (RLIMIT_AS)."
    )
    cpu_time_s: Duration | None = Field(
        default=None, alias="cpu_time", description="CPU time of each process, rounded up to a second (RLIMIT_CPU)."
    )
    core_bytes: Size | None = Field(default=None, alias="core", description="Size of a core dump (RLIMIT_CORE).")
    file_size_bytes: Size | None = Field(
        default=None, alias="file_size", description="Size of a file that the hook writes (RLIMIT_FSIZE)."
    )


_SHELLS = frozenset({"sh", "bash", "dash", "ash", "ksh", "mksh", "zsh", "fish", "busybox", "su", "runuser"})
_RESERVED_ENVIRONMENT = re.compile(r"CNPROCD_.*|LISTEN_.*|WATCHDOG_.*|NOTIFY_SOCKET|LD_.*")
_ACCEPT_COMMAND = 'a list of arguments, the program first: [/usr/lib/oracle/cleanup, --pid, "{pid}"]'


def _parse_command(value: object) -> tuple[Template, ...]:
    """Return an argument list. Event data may be an argument, but not a program, unbounded, or shell text."""
    if isinstance(value, str):
        raise invalid("a command is a list of arguments: there is no shell", _ACCEPT_COMMAND)
    if not isinstance(value, list):
        raise invalid(f"expected a list of arguments, found {shown(value)}", _ACCEPT_COMMAND)
    command = tuple(syntax.each(value, syntax.template, _ACCEPT_COMMAND))
    found = [*_bad_program(command[0]), *_bad_arguments(command)]
    if found:
        raise InvalidValueError(*found)
    return command


def _bad_program(program: Template) -> list[ValueProblem]:
    path = "".join(part for part in program.parts if isinstance(part, str))
    if program.fields:
        return [
            ValueProblem("the program cannot contain fields: event data is never a command", "a fixed path", at=(0,))
        ]
    if not path.startswith("/") or path.endswith("/"):
        hint = "there is no search path and no shell"
        return [ValueProblem(f"{shown(path)} is not an absolute path", "the full path of a program", hint, at=(0,))]
    return []


def _bad_arguments(command: tuple[Template, ...]) -> list[ValueProblem]:
    program = command[0].render(dict.fromkeys(command[0].fields, ""))
    shell = program.rsplit("/", 1)[-1] in _SHELLS
    found = []
    for index, argument in enumerate(command[1:], start=1):
        if "cmdline" in argument.fields:
            hint = (
                "add record: [cmdline] to the rule; the hook then gets it as CNPROCD_CMDLINE in its environment, and "
                "in the event on its standard input"
            )
            message = "{cmdline} cannot be an argument: it is a long text of several words, which a process chooses"
            found.append(ValueProblem(message, hint=hint, at=(index,)))
        elif shell and argument.fields & FREE_TEXT_FIELDS and _is_script(command[index - 1]):
            hint = 'use a variable in the script, such as "$CNPROCD_COMM": the shell does not parse its value'
            found.append(ValueProblem("the shell would run this text, which a process chooses", hint=hint, at=(index,)))
    return found


def _is_script(before: Template) -> bool:
    """Return whether the argument after this one is shell text: -c, -ec, --command."""
    option = before.render(dict.fromkeys(before.fields, ""))
    return option == "--command" or re.fullmatch(r"-[A-Za-z]*c", option) is not None


Command = Annotated[
    tuple[Template, ...],
    PlainValidator(_parse_command),
    YamlForm(
        {
            "type": "array",
            "minItems": 1,
            "prefixItems": [{"type": "string", "pattern": "^/.*[^/]$"}],
            "items": {"type": "string"},
        }
    ),
]


def _parse_environment_name(value: object) -> str:
    accepted = "a letter or _, then letters, digits or _"
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,254}", value, re.ASCII):
        raise invalid(f"invalid variable name: {shown(value)}", accepted)
    if _RESERVED_ENVIRONMENT.fullmatch(value):
        hint = "cnprocd sets CNPROCD_*; the others change how programs load, listen or notify"
        raise invalid(f"{value} is reserved", "any other name", hint)
    return value


EnvironmentName = Annotated[
    str,
    PlainValidator(_parse_environment_name),
    YamlForm({"type": "string", "pattern": "^[A-Za-z_][A-Za-z0-9_]*$"}),
]


def _parse_directory(value: object) -> str:
    path = syntax.text(value, "an absolute path")
    if not path.startswith("/"):
        raise invalid(f"{shown(path)} is not an absolute path", 'an absolute path, like "/var/tmp"')
    return path


Directory = Annotated[str, PlainValidator(_parse_directory), YamlForm({"type": "string", "pattern": "^/"})]


class HookModel(Model):
    """The hook: a program that runs for a match, with the event in its environment and on its standard input."""

    command: Command = Field(
        description="The arguments, without a shell. The first is an absolute path; the others may contain {fields}."
    )
    user: User | None = Field(
        default=None, description="The user to run as; by default the one that starts hooks, root under systemd."
    )
    group: Group | None = Field(default=None, description="The group to run as; by default the user's primary group.")
    timeout_s: Duration = Field(
        default="30s",
        validate_default=True,
        alias="timeout",
        description="The time limit of one attempt. Then the hook and all processes that it started get SIGTERM, and "
        "SIGKILL 5 s later.",
    )
    deadline_s: Duration | None = Field(
        default=None,
        alias="deadline",
        description="The time limit of the job: all attempts that end, and the pauses after "
        "them. Not counted: waiting for a slot, interrupted attempts, and a daemon that is down.",
    )
    retries: Retries = Field(
        default=0,
        description="The number of further attempts after a failed one. Interrupted attempts are not counted.",
    )
    backoff: BackoffModel = Field(default=BackoffModel(), description="The pauses between attempts.")
    env: dict[EnvironmentName, TemplateText] = Field(
        default_factory=dict, description="Variables to add to the environment; values may contain {fields}."
    )
    working_directory: Directory = Field(default="/", description="The directory that the hook starts in.")
    umask: Umask = Field(default="0077", validate_default=True, description="The umask of the hook, in octal.")
    nice: Nice = Field(default=0, description="The scheduling priority, -20 (first) to 19 (last).")
    limits: ResourceLimitsModel | None = Field(default=None, description="Resource limits.")
    slots: Slots | None = Field(
        default=None,
        description="The number of hooks of this rule that can run at once, and the number of hook_slots that are kept "
        "free for them. Rules without slots always share at least one. By default a rule has the slots that are free.",
    )
    serialize: Annotated[Literal["rule", "comm", "none"], *words("rule", "comm", "none")] = Field(
        default="none", description="Which hooks run one at a time: all of the rule, or those of one comm."
    )
    output_limit_bytes: OutputSize = Field(
        default="64K",
        validate_default=True,
        alias="output_limit",
        description="The maximum size of the output that is kept and logged.",
    )
    on_failure: LogModel | None = Field(default=None, description="The log record of a job whose last attempt failed.")


def parse_log(value: object) -> object:
    """Return None for `false` and the default record for `true`."""
    if isinstance(value, bool):
        return LogModel() if value else None
    return value
