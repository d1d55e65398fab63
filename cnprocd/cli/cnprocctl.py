"""cnprocctl: one command, one grammar: `cnprocctl [options] VERB [options] [arguments]`.

The verbs are the table in grammar.py; each is a function that takes the parsed options and returns an exit status, in a
module of its family below verbs/, imported only when it is called: what does not read rules starts without pydantic.

Exit statuses (also in cnprocctl(1)): 0 done; 1 the answer is no; 2 wrong usage; 69 the daemon is not running, or the
kernel has no proc connector for us; 71 the system refused something; 77 not permitted; 78 the rules are wrong.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable

from cnprocd.cli.command_line import parse
from cnprocd.cli.grammar import Options
from cnprocd.cli.terminal import Style, print_json
from cnprocd.errors import CnprocdError

INTERRUPTED = 130  # 128 + SIGINT, as shells say it


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    sys.exit(run(arguments))


def run(arguments: list[str] | None = None) -> int:
    """Do what the command line says; returns the exit status."""
    words = sys.argv[1:] if arguments is None else arguments
    options = parse(words)
    try:
        return _verb(options.run)(options)
    except CnprocdError as error:
        return _report(error, options.json)
    except BrokenPipeError:
        # Whoever read us has had enough (`| head`): nothing is wrong, and nothing more can be said.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as error:
        return _report(CnprocdError(f"{error.filename or 'the system'}: {error.strerror or error}"), options.json)


def _verb(name: str) -> Callable[[Options], int]:
    module, function = name.split(":")
    found: Callable[[Options], int] = getattr(importlib.import_module(f"cnprocd.cli.verbs.{module}"), function)
    return found


def _report(error: CnprocdError, as_json: bool) -> int:
    """Print an error: as text on stderr, or as JSON on stdout. Return the exit status."""
    if as_json:
        print_json({"error": error.value()})
    else:
        print(error.render(Style(sys.stderr)("red", "cnprocctl:") + " "), file=sys.stderr)
    return error.exit_status


if __name__ == "__main__":
    main()
