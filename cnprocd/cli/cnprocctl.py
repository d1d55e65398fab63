"""The command cnprocctl: `cnprocctl [options] VERB [options] [arguments]`.

The verbs are the table in grammar.py. Each is a function that takes the parsed options and returns an exit status. Its
module below verbs/ is imported only for the verb, so commands that read no rules start without pydantic.

Exit statuses (also in cnprocctl(1)): 0 done; 1 the answer is no; 2 wrong usage; 255 ssh failed
(`-H`); 69 the daemon is not running, or the
kernel has no usable proc connector; 71 the system refused a call; 77 not permitted; 78 invalid rules.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable

from cnprocd.cli.command_line import parse
from cnprocd.cli.grammar import Options
from cnprocd.cli.terminal import Style, print_json
from cnprocd.control.client import RefusedError
from cnprocd.errors import CnprocdError
from cnprocd.json_value import JsonDict

INTERRUPTED = 130  # 128 + SIGINT, as shells report it
STREAMS = ("live:watch", "live:top")  # always print JSON line by line
STREAMING = ("follow", "hold")  # options of other verbs that do


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    sys.exit(run(arguments))


def run(arguments: list[str] | None = None) -> int:
    """Carry out the command line. Return the exit status."""
    words = sys.argv[1:] if arguments is None else arguments
    options = parse(words)
    try:
        if options.host or options.until_eof:
            from cnprocd.cli import remote  # most commands need neither ssh nor threads

            hosts, rest = remote.split(words)
            remote.require_all(options.host or (), hosts)
            if hosts:
                return remote.run(hosts, rest, as_json=options.json)
            remote.end_with_input()
        return _verb(options.run)(options)
    except CnprocdError as error:
        return _report(error, options)
    except BrokenPipeError:
        # The output pipe is closed (`| head`): end silently. Python flushes stdout again at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as error:
        return _report(CnprocdError(f"{error.filename or 'system error'}: {error.strerror or error}"), options)


def _verb(name: str) -> Callable[[Options], int]:
    module, function = name.split(":")
    found: Callable[[Options], int] = getattr(importlib.import_module(f"cnprocd.cli.verbs.{module}"), function)
    return found


def _report(error: CnprocdError, options: Options) -> int:
    """Print an error: as text on stderr, or as JSON on stdout, in a stream as one line. Return the exit status."""
    if options.json:
        found: JsonDict = {"what": error.what, "hint": error.hint, "status": error.exit_status}
        problems = error.details.get("problems") if isinstance(error, RefusedError) else None
        streams = options.run in STREAMS or any(getattr(options, name, False) for name in STREAMING)
        print_json({"error": found | ({"problems": problems} if problems else {})}, line=streams)
    else:
        print(error.render(Style(sys.stderr)("red", "cnprocctl:") + " "), file=sys.stderr)
    return error.exit_status


if __name__ == "__main__":
    main()
