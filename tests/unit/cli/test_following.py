"""Following matches: the history after a known one, then the stream, without doubles and without gaps."""

from cnprocd.cli.following import Following
from cnprocd.control.client import Item


def match(number, **fields):
    return {"match_id": f"m{number}", "number": number, **fields}


class History:
    """The daemon's history, in pages of three."""

    def __init__(self, *numbers):
        self.matches = [match(number) for number in numbers]

    def after(self, known):
        ids = [one["match_id"] for one in self.matches]
        first = ids.index(known) + 1 if known else 0
        return self.matches[first : first + 3]


def numbers(found):
    return [one["number"] for one in found]


def test_the_history_is_read_to_its_end_then_the_stream():
    history = History(*range(1, 9))
    following = Following(history.after, "m2")
    stream = [Item(match(8)), None, Item(match(9))]  # 8 was stored while this client subscribed
    assert numbers(following.past()) == [3, 4, 5, 6, 7, 8]
    assert numbers(following.live(stream)) == [9]
    assert following.after == "m9"


def test_what_a_slow_reader_missed_is_read_from_the_history():
    history = History(1)
    following = Following(history.after, "m1")
    assert numbers(following.past()) == []
    history.matches += [match(number) for number in range(2, 8)]
    stream = [Item(match(2)), Item(match(6), skipped=3), Item(match(7)), Item(match(8))]
    assert numbers(following.live(stream)) == [2, 3, 4, 5, 6, 7, 8]


def test_an_empty_history_begins_with_its_first_match():
    history = History()
    following = Following(history.after, "")
    assert numbers(following.past()) == []
    history.matches += [match(1), match(2)]
    assert numbers(following.live([Item(match(2), skipped=1)])) == [1, 2]


def test_matches_that_a_throttle_held_are_no_place_to_go_on_from():
    """The history does not have them, so it cannot go on after one."""
    history = History(1, 2, 4)
    following = Following(history.after, "m2")
    stream = [Item(match(3, held_by="cooldown")), Item(match(5), skipped=1)]
    assert numbers(following.live(stream)) == [3, 4, 5]


def test_matches_without_an_id_do_not_repeat_a_page_for_ever():
    """They are of a release without ids."""
    following = Following(lambda known: [{"number": 1, "match_id": None}], "")
    assert numbers(following.past()) == [1]
