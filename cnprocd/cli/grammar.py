"""Every verb of cnprocctl with its options: the one table from which parser, manual page and completions are made.

One grammar: `cnprocctl [options] VERB [SUBVERB] [options] [arguments]`. The options of all verbs may stand before or
after the verb. A verb names its function as `module:function` below cli/verbs, so that naming it imports nothing.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path

from cnprocd.cli.arguments import EVENT, Argument, arg
from cnprocd.cli.quantities import MOST_RESULTS, count, limit, moment, number, octets, period, seconds

Options = argparse.Namespace
RUNTIME_DIR = Path("/run/cnprocd")
STATE_DIR = Path("/var/lib/cnprocd")
FEATURES = ("event_mask", "taskstats", "socket_filter")
STATES = ("waiting", "running", "done", "dead")
FORMATS = ("table", "json")


@dataclass(frozen=True)
class Verb:
    """A verb. `name` is one word, or two (`jobs list`); `help` is an imperative without a full stop."""

    name: str
    run: str
    help: str
    arguments: tuple[Argument, ...] = ()
    description: str = ""
    examples: tuple[str, ...] = field(default=())


COMMON = (
    arg(
        "--rules",
        type=Path,
        metavar="FILE",
        help="Read only this rule file (default: /etc/cnprocd/rules.yaml and rules.d)",
    ),
    arg(
        "--runtime-dir", type=Path, default=RUNTIME_DIR, metavar="DIR", help="Directory of the daemon's control socket"
    ),
    arg("--state-dir", type=Path, default=STATE_DIR, metavar="DIR", help="Directory of the daemon's jobs"),
    arg(
        "-o",
        "--output",
        choices=FORMATS,
        default="table",
        metavar="FORMAT",
        help="Print a table (default) or json; streams print one JSON object per line",
    ),
    arg("--json", dest="output", action="store_const", const="json", default="table", help="Same as -o json"),
    arg(
        "-H",
        "--host",
        action="append",
        metavar="[USER@]HOST[:PORT]",
        help="Run the verb on this host, over ssh(1); may be repeated",
    ),
    arg("--until-eof", action="store_true", help="End when standard input ends; -H uses it on the other host"),
)

_RULE = arg("--rule", metavar="NAME", help="Only this rule; a glob such as 'ora*' is accepted")
_LIMIT = arg(
    "-n", "--limit", type=limit, default=50, metavar="N", help=f"Maximum number of results, 1 to {MOST_RESULTS} (50)"
)
_WITHOUT = arg(
    "--without",
    action="append",
    default=[],
    choices=FEATURES,
    metavar="FEATURE",
    help="Assume a kernel that lacks event_mask, taskstats or socket_filter; may be repeated",
)

_DRAFT = arg(
    "--draft",
    type=Path,
    metavar="FILE",
    help="Take the content of this rule file from standard input, as if it had been saved",
)

_MATCH = arg(
    "--match",
    metavar="YAML",
    help="Only what this match of the rule language accepts: '{comm: \"ora_*\", user: oracle}'",
)
_FOR = arg("--for", dest="duration", type=seconds, metavar="TIME", help="Stop after this time")
_COUNT = arg("-n", "--count", type=count, metavar="N", help="Stop after this number of lines")
_AFTER = arg("--after", metavar="ID", help="Go on after the match with this match_id; '' begins with the oldest one")
_NAMES = arg("names", nargs="+", metavar="RULE", help="Names of rules")
_RULE_FILE = arg("file", type=Path, metavar="FILE", help="Rule file that the daemon reads")
_JOB = arg("job", type=number, metavar="ID", help="Job number")
_JOBS = arg("jobs", type=number, nargs="+", metavar="ID", help="Job numbers")


def _some_or_all(state: str) -> tuple[Argument, ...]:
    return (
        arg("jobs", type=number, nargs="*", default=[], metavar="ID", help="Job numbers"),
        arg("--rule", metavar="NAME", help=f"All {state} jobs of this rule; a glob such as 'ora*' is accepted"),
        arg("--all", action="store_true", help=f"All {state} jobs"),
    )


VERBS = (
    Verb(
        "status",
        "daemon:status",
        "Show daemon health and the hits of each rule",
        description="Show daemon health and the hits of each rule. Hits are counted across restarts of the daemon. A "
        "reload that removes a rule forgets its hits. The line reload is shown if the last reload failed, or if rule "
        "files were changed and not loaded.",
    ),
    Verb(
        "reload",
        "daemon:reload",
        "Load the rule files into the running daemon",
        description="Return when the new rules are in force, and print the warnings of check. If any file is invalid, "
        "no file is loaded: the errors are shown, the exit status is 78, and the daemon keeps the current rules.",
    ),
    Verb(
        "check",
        "rules:check",
        "Report errors and warnings in rule files",
        (
            arg(
                "files",
                nargs="*",
                type=Path,
                default=[],
                metavar="FILE",
                help="Rule files to check together, the first as the main file; - reads standard input",
            ),
            arg("--strict", action="store_true", help="Treat warnings as errors"),
            arg(
                "--other-host",
                action="store_true",
                help="The rules are for another machine: ignore the users, groups and hooks of this one",
            ),
            arg(
                "--observe-only",
                action="store_true",
                help="The rules are for a daemon that only observes: rules with hooks are errors",
            ),
            _DRAFT,
        ),
        description="Show every error of every file with its line and column. Warn of rules that are valid but "
        "probably not intended, of hooks that cannot run, and of files that the daemon's user cannot read. Without "
        "FILE, check the files that the daemon would load. Needs no daemon. The exit status is 0, or 78 if a file is "
        "invalid. With --json, rules_hash is the hash that `status` and the metrics of a daemon show that has "
        "loaded these files, wherever they stand.",
        examples=(
            "cnprocctl check",
            "cnprocctl check rules.yaml rules.d/*.yaml",
            "cnprocctl check - < rules.yaml",
            "cnprocctl check --draft /etc/cnprocd/rules.d/oracle.yaml < oracle.yaml",
        ),
    ),
    Verb(
        "explain",
        "explain:explain",
        "Show the cost of rules, or why an event matches or does not",
        (
            arg("rule", nargs="?", metavar="RULE", help="Only this rule; a glob such as 'ora*' is accepted"),
            arg("--job", type=number, metavar="ID", help="Explain the event of this job"),
            _WITHOUT,
            _DRAFT,
            *EVENT,
        ),
        description="Without an event, show what the rules request from the kernel, and its cost. With an event (of "
        "options, in JSON, of a running process or of a job), show for each rule whether it matches and why: for every "
        "key yes, no or unknown.",
        examples=("cnprocctl explain", "cnprocctl explain --comm ora_pmon_X --signal KILL --user oracle"),
    ),
    Verb(
        "test",
        "trial:test",
        "Show which rules match a described event",
        (_DRAFT, *EVENT),
        description="For each rule that matches, show its message, its hook, and the known fields of the record (with "
        "--json all fields). Nothing is run, and no daemon is needed. A PID alone stands for a running process that "
        "ends now; only a running daemon knows the path that its program had before it was moved. Without an end, the "
        "exit code is 0. The exit status is 0 if a rule matches, else 1.",
        examples=(
            "cnprocctl test --comm ora_pmon_X --exit-code 3 --user oracle",
            "cnprocctl test --pid 1234 --status 9",
        ),
    ),
    Verb("schema", "rules:schema", "Print the JSON schema of rule files, for editors"),
    Verb(
        "rules list",
        "rule_view:listed",
        "List the rules in force",
        description="Show the rules in force with their state and hits. The column FILES compares the rule files with "
        "them: same, changed, removed or new. If no daemon answers, show the rules in the files.",
    ),
    Verb(
        "rules show",
        "rule_view:show",
        "Show a rule with its defaults, its file, and whether it is in force",
        (arg("rule", metavar="RULE", help="Name of the rule"),),
        description="Print the rule of the files as YAML, with all defaults and with named lists expanded. Above it: "
        "the file and line, the drop-in files that this file overrides, and whether the rule in force is the same. If "
        "it is not, the differences follow.",
    ),
    Verb("rules enable", "rules:enable", "Enable rules that `rules disable` disabled", (_NAMES,)),
    Verb(
        "rules disable",
        "rules:disable",
        "Disable rules without editing their file",
        (
            _NAMES,
            arg("--for", dest="duration", type=period, metavar="TIME", help="Enable the rules again after this time"),
        ),
        description="Write the names to the file `disabled` beside the rule file (/etc/cnprocd/disabled), and reload a "
        "running daemon. The rules stay disabled until `rules enable`, or for the time of --for. That time goes on "
        "while the daemon does not run.",
        examples=("cnprocctl rules disable oracle-process-died --for 2h",),
    ),
    Verb(
        "rules read",
        "rule_file:read",
        "Print a rule file, for an editor",
        (_RULE_FILE,),
        description="With --json, print the text, the line ending, the hash of the content, and the reason if an "
        "editor of text would change more of the file than its user does: bytes that are not UTF-8, or lines that end "
        "in different ways. The hash of a file that does not exist is none.",
    ),
    Verb(
        "rules write",
        "rule_file:write",
        "Replace a rule file by standard input, for an editor",
        (_RULE_FILE, arg("--hash", metavar="HASH", help="Only if `rules read` shows this hash of the file")),
        description="The file keeps its owner, mode, access list and security label; a symbolic link stays, and its "
        "target is written. The content is not checked, and the daemon does not load it before `reload`. Files of "
        "packages are not written. If the file has another hash, or others than root can change it, nothing is "
        "written, and the exit status is not 0.",
        examples=("cnprocctl rules write /etc/cnprocd/rules.d/oracle.yaml < oracle.yaml",),
    ),
    Verb("jobs list", "jobs:listed", "List the newest jobs", (
        arg("--state", choices=STATES, metavar="STATE", help="Only jobs in this state: " + ", ".join(STATES)),
        _RULE,
        _LIMIT,
    )),
    Verb("jobs show", "jobs:show", "Show a job, its events and the end of its output", (_JOB,)),
    Verb(
        "jobs log",
        "jobs:log",
        "Print the output of a job's last attempt",
        (_JOB, arg("-f", "--follow", action="store_true", help="Print further output until the job has ended")),
        description="Print what the last attempt of a job wrote to standard output and standard error, or what the "
        "running one has written so far. It is kept up to the output_limit of the rule, at most 256 KiB for a job and "
        "64 MiB for all; then the output of the oldest jobs is deleted.",
    ),
    Verb(
        "jobs retry",
        "jobs:retry",
        "Run dead jobs again",
        _some_or_all("dead"),
        description="The jobs wait again, with all their attempts. A job that cannot be retried is reported, and the "
        "exit status is then 1.",
        examples=("cnprocctl jobs retry 41 42", "cnprocctl jobs retry --rule oracle-process-died"),
    ),
    Verb(
        "jobs drop",
        "jobs:drop",
        "Cancel waiting jobs",
        _some_or_all("waiting"),
        description="The jobs are dead, and their hooks do not run, unless `jobs retry` is used. With --rule and "
        "--all, the jobs that a flood has deferred are dropped as well; these cannot be retried.",
    ),
    Verb(
        "jobs kill",
        "jobs:kill",
        "End running hooks",
        (_JOBS, arg("--retry", action="store_true", help="Retry the jobs as after any other failure")),
        description="Send SIGTERM to the hook and to all processes that it started, and SIGKILL after 5 seconds. The "
        "attempt has failed with the reason `killed by an operator`. The job is dead, even if retries are left, unless "
        "--retry is given; `jobs retry` runs it again.",
    ),
    Verb(
        "history",
        "history:history",
        "List past matches, the newest last",
        (
            arg("--rule", metavar="NAME", help="Only this rule; a glob such as 'ora*' is accepted"),
            arg("--comm", metavar="NAME", help="Only this command name; a glob such as 'ora_*' is accepted"),
            arg("--pid", type=number, metavar="PID", help="Only this process ID"),
            arg("--user", metavar="NAME", help="Only this user: name or uid"),
            arg("--unit", metavar="UNIT", help="Only this systemd unit; a glob such as 'oracle*' is accepted"),
            arg("--since", type=moment, metavar="TIME", help="Only matches from this time on: yesterday, 22:00, 2h"),
            arg("--until", type=moment, metavar="TIME", help="Only matches up to this time"),
            _LIMIT,
            _AFTER,
            arg("-f", "--follow", action="store_true", help="Go on with the next matches, until a signal"),
        ),
        description="For each match, show the state of its job now: waiting, running, done, or dead with the reason. "
        "With --after, list the first matches that follow, the oldest first; the last of them is the next ID. If the "
        "match is no longer kept, the exit status is 1. "
        "TIMES in cnprocctl(1) describes the forms of times.",
        examples=(
            "cnprocctl history --since yesterday --until '2026-11-25 22:00'",
            "cnprocctl history --rule 'oracle-*' --user oracle -n 20",
        ),
    ),
    Verb(
        "watch",
        "live:watch",
        "Follow matches as they happen, or all events with --events",
        (
            arg("--events", action="store_true", help="Show every event of every process; needs root, not the daemon"),
            arg("--kinds", metavar="LIST", help="With --events, only these kinds: exit,exec"),
            _RULE,
            _MATCH,
            arg("--rate", type=number, metavar="N", help="Maximum number of lines per second (terminal: 50; 0: all)"),
            _AFTER,
            _COUNT,
            _FOR,
        ),
        description="Matches come from the daemon. With --events, cnprocctl subscribes to the kernel with a socket of "
        "its own, so that the daemon does not request more events than its rules need. Lines beyond the rate are left "
        "out and counted. JSON is never left out, unless its reader is too slow; then the number is "
        "reported. With --after, matches of the history come first, and matches that were skipped are "
        "read from the history.",
        examples=("cnprocctl watch", "cnprocctl watch --events --kinds exit --match '{exit_code: \"!= 0\"}'"),
    ),
    Verb(
        "top",
        "live:top",
        "Rank processes by forks, failures and exits",
        (
            arg(
                "--by",
                choices=("comm", "unit", "user"),
                default="comm",
                metavar="KEY",
                help="Group by comm (default), unit or user",
            ),
            arg("--interval", type=period, default=2.0, metavar="TIME", help="Time between two screens (2s)"),
            arg("-n", "--lines", type=count, default=20, metavar="N", help="Number of lines (20)"),
            _FOR,
        ),
    ),
    Verb("metrics", "daemon:metrics", "Print the daemon's counters as Prometheus text"),
    Verb(
        "doctor",
        "doctor:doctor",
        "Diagnose setup problems and suggest fixes",
        description="Each line starts with pass, warn or fail. The exit status is 0 if nothing failed, else 1. Needs "
        "no daemon. Run it as root: some checks need root.",
    ),
    Verb(
        "record",
        "recording:record",
        "Record events to a file for `replay`",
        (
            arg("file", type=Path, nargs="?", metavar="FILE", help="File to create"),
            arg("--hold", action="store_true", help="Give the recording no name; delete it when standard input ends"),
            arg("--for", dest="duration", type=seconds, default=60.0, metavar="TIME", help="Duration (60s)"),
            arg("--max-size", type=octets, default=64 << 20, metavar="SIZE", help="Maximum size of the file (64M)"),
        ),
        description="Needs root. The file holds every event and exit record as the kernel sent it, and the names, "
        "arguments and users of all processes. Only its owner can read it. With --hold, for programs, the recording is "
        "in a file of /var/tmp without a name: the path in /proc that is printed leads to it while this command runs. "
        "A line on standard input ends the recording; the end of standard input, or of this command, deletes it.",
    ),
    Verb(
        "replay",
        "recording:replay",
        "Evaluate rules on a recording",
        (
            arg("file", type=Path, nargs="?", metavar="FILE", help="File that `record` wrote"),
            arg("--history", action="store_true", help="Evaluate the rules on past matches instead of a recording"),
            _RULE,
            arg("-n", "--limit", type=limit, metavar="N", help="Only the newest N matches (with --history 50)"),
            _DRAFT,
        ),
        description="The same file and the same rules give the same matches on any machine. Nothing is run. With "
        "--history, show for each event of the newest past matches which rules fired, and which would fire now. A rule "
        "that needs a field that was not recorded is shown as unknown. The history has only events that some rule "
        "matched; `record` keeps all. There, --rule selects the past matches.",
        examples=("cnprocctl replay it.rec", "cnprocctl replay --history -n 1000"),
    ),
    Verb(
        "help",
        "help:show",
        "Show the help of a verb",
        (arg("words", nargs="*", metavar="VERB", help="The verb, of one or two words"),),
        examples=("cnprocctl help rules list",),
    ),
)  # fmt: skip

GROUPS = {"rules": "List, show, enable and disable rules", "jobs": "List, show, retry, cancel and end jobs"}
