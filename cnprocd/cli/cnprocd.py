"""The command line of the daemon: options in, exit status out. The only place where cnprocd exits.

Exit statuses: 0 clean stop, 2 wrong usage, 69 the kernel has no usable proc connector, 71 the system refused a call,
75 another cnprocd holds the state directory, 77 CAP_NET_ADMIN is missing, 78 invalid rules.
"""

from __future__ import annotations

import cnprocd.cli.without_openssl  # noqa: F401 (first: it decides what the others load)

# isort: split
import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

from cnprocd import __version__
from cnprocd.cli.observing import VARIABLE, observes_only
from cnprocd.cli.snapshots import last_accepted, load_former, start_accepting, start_loader
from cnprocd.cli.standard_files import STDERR, STDOUT, fill_missing
from cnprocd.errors import EX_OK, CnprocdError
from cnprocd.rules.loader_process import DigestsProcess, LoaderFailedError, LoaderProcess
from cnprocd.rules.problems import LoadedRules, RulesError
from cnprocd.rules.rule_files import MAIN_FILE
from cnprocd.rules.snapshot_files import DIRECTORY_NAME, RUNNER_DIRECTORY

if TYPE_CHECKING:
    from cnprocd.spool.disk_worker import DiskWorker

_FEATURES = ("event_mask", "taskstats", "socket_filter", "pidfd_info", "kernel_log")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the options of cnprocd(8)."""
    result = argparse.ArgumentParser(
        prog="cnprocd",
        description="Listen to the kernel's proc connector, match rules, run hooks and log. Runs in the foreground.",
        epilog="SIGHUP reloads the rules; SIGTERM and SIGINT stop cleanly. See cnprocctl(1) for everything else.",
    )
    add = result.add_argument
    add(
        "--rules",
        type=Path,
        metavar="FILE",
        help="Read only this rule file (default: /etc/cnprocd/rules.yaml and rules.d)",
    )
    add("--state-dir", type=Path, default=Path("/var/lib/cnprocd"), metavar="DIR", help="Directory of the job queue")
    add("--runtime-dir", type=Path, default=Path("/run/cnprocd"), metavar="DIR", help="Directory of the control socket")
    add("--log-format", choices=("auto", "json", "console", "journal"), default="auto", help="Format of log records")
    add("--runner", type=Path, metavar="SOCKET", help="Let the runner service start hooks (default: the daemon does)")
    add(
        "--snapshot-dir",
        type=Path,
        metavar="DIR",
        help="Directory of the accepted rules (default: that of the runner, or without it `rules` in --state-dir)",
    )
    add(
        "--observe-only",
        action="store_true",
        help=f"Refuse rules with hooks, and start none of an earlier daemon's jobs (default: ${VARIABLE})",
    )
    add("--check", action="store_true", help="Check the rules, print problems, and exit with 0 or 78")
    add(
        "--refuse",
        action="append",
        choices=_FEATURES,
        default=[],
        help="Do not use a kernel feature, as on older kernels",
    )
    add("--version", action="version", version=f"cnprocd {__version__}")
    return result


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    sys.exit(run(arguments))


def run(arguments: list[str] | None = None) -> int:
    """Carry out the command line. Return the exit status."""
    missing = fill_missing()
    options = parser().parse_args(arguments)
    options.observe_only = observes_only(options.observe_only, os.environ)
    options.runner = None if options.observe_only else options.runner
    try:
        if STDOUT in missing and options.log_format != "journal" and not options.check:
            what = "cannot write log records: standard output is closed"
            raise CnprocdError(what, "open it, or use --log-format journal")
        if options.check:
            return _report(_read(options.rules, options.observe_only))
        reading = _start_loader(options)
        with _disk_worker() as disk:
            return _serve(options, reading, disk)
    except CnprocdError as error:
        print(error.render("cnprocd: "), file=sys.stderr)
        return error.exit_status


@contextlib.contextmanager
def _disk_worker() -> Iterator[DiskWorker | None]:
    """Start the process of the spool, which loads while another reads the rules. None: it cannot be started now."""
    from cnprocd.spool.disk_worker import DiskWorker

    try:
        worker = DiskWorker()
    except OSError:  # it is tried again, and reported, when it is needed
        yield None
        return
    try:
        yield worker
    except CnprocdError:
        worker.close()
        raise


def _start_loader(options: argparse.Namespace) -> LoaderProcess[LoadedRules]:
    return start_loader(options.rules, stores=options.runner is None, observe_only=options.observe_only)


def _read(rules: Path | None, observe_only: bool) -> LoadedRules:
    from cnprocd.rules.language.disabled import load_in_force  # imports pydantic, which the daemon does without

    return load_in_force(rules, observe_only=observe_only)


def snapshot_directory(options: argparse.Namespace) -> Path:
    """Return the directory of the accepted rules: only the runner, or the daemon without one, writes to it."""
    if options.snapshot_dir is not None:
        return cast(Path, options.snapshot_dir)
    return cast(Path, options.state_dir) / DIRECTORY_NAME if options.runner is None else RUNNER_DIRECTORY


def _result_or_last_accepted(
    reading: LoaderProcess[LoadedRules], rules: Path | None, directory: Path, observe_only: bool
) -> tuple[LoadedRules, RulesError | None]:
    """Return the loaded rules; if the files are invalid, those that were accepted last, and the error.

    Raises RulesError if none were accepted.
    """
    try:
        return reading.result(), None
    except LoaderFailedError:
        raise
    except RulesError as error:
        accepted = last_accepted(rules, directory, observe_only=observe_only)
        if accepted is None:
            raise
        return accepted, error


def _report(loaded: LoadedRules) -> int:
    from cnprocd.cli.problem_text import painted
    from cnprocd.cli.terminal import Style, counted

    for warning in loaded.warnings:
        print(painted(warning, "yellow", "warning", Style(sys.stderr)), file=sys.stderr)
    print(f"{', '.join(map(str, loaded.files))}: {counted(len(loaded.rules), 'rule')}, no errors")
    return EX_OK


def _serve(options: argparse.Namespace, reading: LoaderProcess[LoadedRules], disk: DiskWorker | None) -> int:
    # Imported while another process reads the rules.
    import asyncio

    from cnprocd.daemon import serve
    from cnprocd.output.journal import is_journal_stream
    from cnprocd.output.log import make_log, make_output
    from cnprocd.service import ServiceManager
    from cnprocd.stalls import Stalls
    from cnprocd.wiring import Options, Outside

    directory = snapshot_directory(options)
    loaded, broken = _result_or_last_accepted(reading, options.rules, directory, options.observe_only)
    manager = ServiceManager(os.environ)
    output = make_output(options.log_format, STDOUT, is_journal_stream(os.environ, STDERR))
    log = make_log(output, loaded.settings.log_level)
    for warning in loaded.warnings:
        log("warning", "rules_warning", message=warning.sentence)
    if broken is not None:
        message = f"invalid rule files; using the rules that were accepted last\n{broken.render()}"
        log("error", "rules_rejected", problems=len(broken.problems), message=message)
    stalls = Stalls(log)
    refused = frozenset(options.refuse)
    settings = Options(
        options.rules, options.state_dir, options.runtime_dir, refused, options.runner, options.observe_only
    )
    outside = Outside(
        load=lambda: _start_loader(options).wait(),
        read_digests=lambda: DigestsProcess(options.rules, options.rules or MAIN_FILE).wait(),
        store_snapshot=lambda loaded, keep: start_accepting(directory, loaded, keep).wait(),
        load_former=lambda digests: load_former(directory, digests),
        manager=manager,
        log=log,
        output=output,
        stalls=stalls,
        own_tgid=os.getpid(),
        disk=disk,
        broken=broken,
    )
    with asyncio.Runner(loop_factory=stalls.make_loop) as runner:
        runner.run(serve(settings, loaded, outside))
    return EX_OK


if __name__ == "__main__":
    main()
