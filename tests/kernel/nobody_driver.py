"""Run one hook as an unprivileged user would, and print its output; for test_hooks_root.py."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path

from unit.hookkit import request, running, shell


async def main(user: str, script: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        spec = shell(script, user=user or None)
        async with running(Path(directory), {"r": spec}) as (spool, scheduler, records):
            spool.enqueue([request("r")])
            scheduler.wake()
            await records.ended(1)
            for fields in records.of("hook_output"):
                print(fields["line"])
            for fields in records.of("hook_failed"):
                print("failed:", fields["reason"])


asyncio.run(main(*sys.argv[1:3]))
