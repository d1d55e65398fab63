"""Kernel tests need root and a working proc connector; elsewhere they are skipped with the reason."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def _why_not() -> str | None:
    from cnprocd.connector.listener import Listener
    from cnprocd.errors import CnprocdError

    if os.geteuid() != 0:
        return "needs root"
    try:
        listener = Listener.open(1 << 20)
        listener.subscribe(0.5)
    except CnprocdError as error:
        return str(error)
    listener.unsubscribe()
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    reason = _why_not() if here else None
    for item in here:
        item.add_marker(pytest.mark.kernel)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=f"no proc connector here: {reason}"))
