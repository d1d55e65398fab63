"""Names of the rules in force are asked for again, and put in force without a reload."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from cnprocd import name_resolution
from cnprocd.name_resolution import NameResolution
from cnprocd.rules.language.load import load
from cnprocd.rules.unresolved import unresolved_names

LONG_S = 30.0


class Scene:
    """Rules with two names without an id, and a name service."""

    def __init__(self, directory) -> None:
        file = directory / "rules.yaml"
        file.write_text("rules: [{name: a, events: exit, match: {user: [larry, 7], group: ghosts}}]\n")
        self.ids: dict[tuple[str, str], int] = {}
        self.silent = False
        self.asked = 0
        self.records: list[Any] = []
        loaded = load(file, user=lambda name: None, group=lambda name: None)
        self.rules: Any = SimpleNamespace(loaded=loaded, on_swap=[], change=self.change)
        self.resolution = NameResolution(
            self.rules, self.id_of, lambda level, event, **fields: self.records.append(fields)
        )

    def change(self, change) -> None:
        self.rules.loaded = change(self.rules.loaded)
        for handler in self.rules.on_swap:
            handler()

    def id_of(self, kind, name):
        self.asked += 1
        if self.silent:
            raise OSError("the name service does not answer")
        return self.ids.get((kind, name))


@pytest.fixture
def scene(tmp_path, monkeypatch):
    monkeypatch.setattr(name_resolution, "FIRST_S", 0.001)
    monkeypatch.setattr(name_resolution, "MOST_S", 0.004)
    return Scene(tmp_path)


def run(scene, condition):
    async def until():
        scene.resolution.start()
        while not condition():
            await asyncio.sleep(0.001)
        scene.resolution.stop()

    asyncio.run(asyncio.wait_for(until(), LONG_S))


def test_a_name_that_appears_is_put_in_force(scene):
    before = scene.rules.loaded.digests
    scene.ids["user", "larry"] = 1000
    run(scene, lambda: scene.records)
    assert scene.rules.loaded.rules[0].match.user == (1000, 7)
    assert scene.rules.loaded.digests != before  # as of files whose names are known
    assert scene.records[0]["names"] == ["user larry"]
    assert {one.name for one in unresolved_names(scene.rules.loaded.rules)} == {"ghosts"}


def test_it_goes_on_until_all_names_are_known(scene):
    run(scene, lambda: scene.asked >= 6)
    scene.ids = {("user", "larry"): 1, ("group", "ghosts"): 2}
    run(scene, lambda: scene.records)
    asked = scene.asked
    scene.resolution.start()  # nothing is left to ask
    assert scene.asked == asked and not unresolved_names(scene.rules.loaded.rules)


def test_a_silent_service_is_asked_again(scene):
    scene.silent = True
    run(scene, lambda: scene.asked >= 4)
    assert scene.records == []
    scene.silent = False
    scene.ids = {("user", "larry"): 1, ("group", "ghosts"): 2}
    run(scene, lambda: scene.records)
