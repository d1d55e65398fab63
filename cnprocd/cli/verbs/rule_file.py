"""`cnprocctl rules read` and `rules write`: a rule file for an editor. The rules in force stay as they are."""

from __future__ import annotations

import os
import sys

from cnprocd.cli.grammar import Options
from cnprocd.cli.rule_edit import read_text, require_rule_file, write_text
from cnprocd.cli.standard_files import read_input
from cnprocd.cli.terminal import print_json
from cnprocd.errors import EX_NOPERM, EX_OK, CnprocdError
from cnprocd.rules.rule_files import LARGEST


def read(options: Options) -> int:
    """Print a rule file; with --json, its text, line ending, hash, and why it must not be edited as text."""
    path = require_rule_file(options.file, options.rules)
    found = read_text(path)
    if options.json:
        target = os.path.realpath(path)
        print_json(
            {
                "file": str(path),
                "target": target if target != str(path) else None,
                "text": found.text,
                "newline": found.newline,
                "hash": found.hash,
                "read_only": found.read_only,
            }
        )
        return EX_OK
    sys.stdout.write(found.text)
    return EX_OK


def write(options: Options) -> int:
    """Replace a rule file by standard input."""
    path = require_rule_file(options.file, options.rules)
    data = read_input(LARGEST + 1)
    try:
        digest = write_text(path, data, options.hash)
    except OSError as error:
        refused = CnprocdError(f"cannot write {path}: {error.strerror}")
        refused.exit_status = EX_NOPERM if isinstance(error, PermissionError) else refused.exit_status
        raise refused from error
    if options.json:
        print_json({"file": str(path), "hash": digest})
    else:
        print(f"{path}: {len(data)} bytes written; `cnprocctl reload` loads them")
    return EX_OK
