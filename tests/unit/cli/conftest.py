"""For the tests of commands: this machine has no service user, even if cnprocd is installed on it."""

import pytest

from cnprocd.cli import this_machine


@pytest.fixture(autouse=True)
def no_service_user(monkeypatch):
    monkeypatch.setattr(this_machine, "SERVICE_USER", "no-such-user")
