"""The command line of the daemon: options in, exit status out. The only place where cnprocd exits.

Exit statuses: 0 clean stop, 2 wrong usage, 69 the kernel has no usable proc connector, 71 the system refused a call,
75 another cnprocd holds the state directory, 77 CAP_NET_ADMIN is missing, 78 invalid rules.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from cnprocd import __version__
from cnprocd.cli.standard_files import STDERR, STDOUT, fill_missing
from cnprocd.errors import EX_OK, CnprocdError
from cnprocd.rules.loader_process import LoaderProcess
from cnprocd.rules.problems import LoadedRules
from cnprocd.rules.rule_files import MAIN_FILE, file_digests, rule_files

_FEATURES = ("event_mask", "taskstats", "socket_filter", "pidfd_info")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the options of cnprocd(8)."""
    result = argparse.ArgumentParser(
        prog="cnprocd",
        description="Listen to the kernel's proc connector, match rules, run hooks and log. Runs in the foreground.",
        epilog="SIGHUP reloads the rules; SIGTERM and SIGINT stop cleanly. See cnprocctl(1) for everything else.",
    )
    add = result.add_argument
    add("--rules", type=Path, metavar="FILE", help="only this file (default: /etc/cnprocd/rules.yaml and rules.d)")
    add("--state-dir", type=Path, default=Path("/var/lib/cnprocd"), metavar="DIR", help="directory of the job queue")
    add("--runtime-dir", type=Path, default=Path("/run/cnprocd"), metavar="DIR", help="directory of the control socket")
    add("--log-format", choices=("auto", "json", "console", "journal"), default="auto", help="format of log records")
    add("--runner", type=Path, metavar="SOCKET", help="let the runner service start hooks (default: the daemon does)")
    add("--check", action="store_true", help="check the rules, print problems, and exit with 0 or 78")
    add(
        "--refuse",
        action="append",
        choices=_FEATURES,
        default=[],
        help="do not use a kernel feature, as on older kernels",
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
    try:
        if STDOUT in missing and options.log_format != "journal" and not options.check:
            what = "cannot write log records: standard output is closed"
            raise CnprocdError(what, "open it, or use --log-format journal")
        if options.check:
            return _report(_read(options.rules))
        return _serve(options, _start_loader(options.rules))
    except CnprocdError as error:
        print(error.render("cnprocd: "), file=sys.stderr)
        return error.exit_status


def _read(rules: Path | None) -> LoadedRules:
    from cnprocd.rules.language.disabled import load_in_force  # imports pydantic, which the daemon does without

    return load_in_force(rules)


def _start_loader(rules: Path | None) -> LoaderProcess[LoadedRules]:
    return LoaderProcess(lambda: _read(rules), rules or MAIN_FILE)


def _start_digests(rules: Path | None) -> LoaderProcess[dict[Path, str]]:
    return LoaderProcess(lambda: file_digests(rule_files(rules)), rules or MAIN_FILE)


def _report(loaded: LoadedRules) -> int:
    for warning in loaded.warnings:
        print(warning.render(), file=sys.stderr)
    count = len(loaded.rules)
    print(f"{', '.join(map(str, loaded.files))}: {count} rule{'' if count == 1 else 's'}, no errors")
    return EX_OK


def _serve(options: argparse.Namespace, reading: LoaderProcess[LoadedRules]) -> int:
    # Imported while another process reads the rules.
    import asyncio

    from cnprocd.daemon import serve
    from cnprocd.output.journal import is_journal_stream
    from cnprocd.output.log import make_log, make_output
    from cnprocd.service import ServiceManager
    from cnprocd.wiring import Options, Outside

    loaded = reading.result()
    manager = ServiceManager(os.environ)
    output = make_output(options.log_format, STDOUT, is_journal_stream(os.environ, STDERR))
    log = make_log(output, loaded.settings.log_level)
    for warning in loaded.warnings:
        log("warning", "rules_warning", message=warning.sentence)
    refused = frozenset(options.refuse)
    settings = Options(options.rules, options.state_dir, options.runtime_dir, refused, options.runner)
    outside = Outside(
        load=lambda: _start_loader(options.rules).wait(),
        read_digests=lambda: _start_digests(options.rules).wait(),
        manager=manager,
        log=log,
        output=output,
        own_tgid=os.getpid(),
    )
    asyncio.run(serve(settings, loaded, outside))
    return EX_OK


if __name__ == "__main__":
    main()
