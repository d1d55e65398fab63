"""A fixture for tests that start worker processes: they are gone when the test is over."""

from __future__ import annotations

import os
import time

import pytest


@pytest.fixture(autouse=True)
def children_reaped():
    """Set up first, so torn down last: after the test has closed its edges and killed its processes."""
    yield
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.001)
        except ChildProcessError:
            return
