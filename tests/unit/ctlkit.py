"""cnprocctl as a user types it, for the tests of its verbs."""

import contextlib
import io
import json
import subprocess
import sys

from cnprocd.cli.cnprocctl import run


def command(*words, rules=None):
    """Run cnprocctl as a process; (exit status, stdout, stderr)."""
    options = ["--rules", str(rules)] if rules is not None else []
    done = subprocess.run(
        [sys.executable, "-m", "cnprocd.cli.cnprocctl", *options, *words], capture_output=True, text=True
    )
    return done.returncode, done.stdout, done.stderr


def ctl(*words, rules=None):
    """The same within this process, which spares the second that importing pydantic takes."""
    options = ["--rules", str(rules)] if rules is not None else []
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = run([*options, *words])
    return status, out.getvalue(), err.getvalue()


def ctl_json(*words, rules=None):
    status, out, err = ctl("--json", *words, rules=rules)
    assert err == ""
    return status, json.loads(out)
