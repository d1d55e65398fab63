"""The interface description against the verbs that the daemon has. tests/kernel/test_varlink.py checks the replies."""

import ast
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from unit.control.varlink_idl import parse

from cnprocd.control import protocol, view
from cnprocd.control.interface import DESCRIPTION, SERVICE_DESCRIPTION
from cnprocd.control.protocol import INTERFACE, SERVICE, method_of
from cnprocd.control.verbs import verbs_of

FILE = Path(__file__).parents[3] / "config" / "io.cnprocd.varlink"


def test_every_verb_is_a_method_with_its_parameters():
    daemon: Any = SimpleNamespace(stalls=None)
    verbs = {method_of(name): verb.takes for name, verb in verbs_of(daemon).items()}
    described = {f"{INTERFACE}.{name}": set(takes) for name, (takes, _) in parse(DESCRIPTION).methods.items()}
    assert verbs == described


def test_every_field_of_status_is_described():
    """A new one goes into cnprocd/control/interface.py; `python packaging/manual.py` writes the file."""
    tree = ast.parse(Path(view.__file__).read_text())
    (status,) = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "status"]
    (written,) = [node.value for node in ast.walk(status) if isinstance(node, ast.Return)]
    assert isinstance(written, ast.Dict)
    keys = [key.value for key in written.keys if isinstance(key, ast.Constant)]
    assert keys == list(parse(DESCRIPTION).methods["Status"][1])


def test_every_error_is_described():
    names = [value for name, value in vars(protocol).items() if name.isupper() and isinstance(value, str)]
    ours = {name.removeprefix(f"{INTERFACE}.") for name in names if name.startswith(f"{INTERFACE}.")}
    theirs = {name.removeprefix(f"{SERVICE}.") for name in names if name.startswith(f"{SERVICE}.")}
    assert ours == set(parse(DESCRIPTION).errors)
    assert theirs <= set(parse(SERVICE_DESCRIPTION).errors)
    assert all({"what", "hint", "status"} <= set(fields) for fields in parse(DESCRIPTION).errors.values())


def test_the_interface_file_is_the_description():
    assert FILE.read_text() == DESCRIPTION


@pytest.mark.skipif(shutil.which("varlinkctl") is None, reason="varlinkctl is not installed (systemd 255 or newer)")
def test_varlinkctl_accepts_the_interface_file():
    done = subprocess.run(["varlinkctl", "validate-idl", str(FILE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
