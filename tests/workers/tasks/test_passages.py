from __future__ import annotations

import random
import re
from itertools import pairwise

import pytest

from workers.errors import TaskError
from workers.tasks import TextTask


def text(characters: int, *, seed: int = 0, longest: int = 12) -> str:
    generator = random.Random(seed)
    words, length = [], 0
    while length < characters:
        words.append("".join(generator.choices("abcdef", k=generator.randint(1, longest))))
        words.append(generator.choice([" ", "\n", "\n\n", "  "]))
        length += len(words[-1]) + len(words[-2])
    return "".join(words)


def number(id: str) -> int:
    return int(id.removeprefix("text-"))


def test_passages_hold_every_word_of_the_text_once_and_whole() -> None:
    whole = text(20_400)
    task = TextTask.of(whole)
    passages = sorted((*task.search, *task.held_out), key=lambda each: number(each.id))
    assert [number(each.id) for each in passages] == list(range(len(passages)))
    joined = [word for each in passages for word in each.text.split()]
    assert joined == whole.split()[: len(joined)]
    assert len(whole) - sum(len(each.text) for each in passages) < 700  # a short end, and white space between
    for each in passages:
        assert 980 <= len(each.text) <= 1000 and each.text == each.text.strip()
        assert re.search(re.escape(each.text) + r"(\s|$)", whole)


def test_even_and_odd_passages_are_apart_and_in_an_order_that_the_text_does_not_give() -> None:
    task = TextTask.of(text(30_000))
    assert {number(each.id) % 2 for each in task.search} == {0} and {number(each.id) % 2 for each in task.held_out} == {
        1
    }
    assert [each.id for each in task.search] != sorted((each.id for each in task.search), key=number)
    assert task.calibration == () and task.split("search") == task.search
    assert len({each.image_key for each in (*task.search, *task.held_out)}) == len(task.search) + len(task.held_out)


def test_of_a_long_text_the_most_passages_are_taken_evenly() -> None:
    task = TextTask.of(text(300_000))
    numbers = sorted(number(each.id) for each in (*task.search, *task.held_out))
    assert len(task.search) == len(task.held_out) == 32
    steps = {after - before for before, after in pairwise(numbers)}
    assert numbers[0] == 0 and numbers[-1] > 280 and max(steps) - min(steps) <= 1


def test_a_repeated_passage_is_in_one_split_alone() -> None:
    one = text(20_000)
    repeated = TextTask.of(one[:1000].rsplit(maxsplit=1)[0] + " " + "x" * 1000 + " " + "x" * 1000 + " " + one)
    keys = [each.image_key for each in (*repeated.search, *repeated.held_out)]
    assert len(keys) == len(set(keys))


def test_a_word_longer_than_a_passage_stays_whole() -> None:
    task = TextTask.of("a" * 5000 + " " + text(12_000))
    assert any(each.text == "a" * 5000 for each in (*task.search, *task.held_out))


def test_the_text_and_its_passages_identify_it() -> None:
    one, other = TextTask.of(text(12_000)), TextTask.of(text(12_000, seed=1))
    assert one == TextTask.of(text(12_000)) and one.split_hash == TextTask.of(text(12_000)).split_hash
    assert one.data_hash != other.data_hash and one.split_hash != other.split_hash
    assert one.definition_hash == other.definition_hash


@pytest.mark.parametrize("short", ["", "word " * 20, text(7_000)])
def test_a_short_text_is_refused_with_what_would_be_enough(short: str) -> None:
    with pytest.raises(TaskError, match=r"passages of about 1000 characters, 8 are needed .*; give a longer text"):
        TextTask.of(short)


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(TaskError, match="text: no split 'test'"):
        TextTask.of(text(12_000)).split("test")
