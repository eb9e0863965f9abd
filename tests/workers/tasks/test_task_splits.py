from __future__ import annotations

import random
import re
from collections import Counter
from typing import Any

import easy_vqa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.errors import TaskError
from workers.tasks import Sample, load_spec, load_task
from workers.tasks.images import ImageFile, SceneImage
from workers.tasks.spec import SplitSizes
from workers.tasks.splits import SPLITS, Region, make_splits


def sizes_of(calibration: int, search: int, held_out: int, **others: Any) -> SplitSizes:
    return SplitSizes(calibration=calibration, search=search, held_out=held_out, **others)


def rows(images: int, questions: int) -> list[Sample]:
    return [
        Sample(f"{image}-{question}", ImageFile(f"{image}.png"), f"key-{image}", "q", ("a",))
        for image in range(images)
        for question in range(questions)
    ]


@settings(max_examples=60)
@given(
    questions=st.integers(1, 4),
    sizes=st.tuples(st.integers(1, 8), st.integers(1, 8), st.integers(1, 8)),
    spare=st.integers(0, 5),
    seed=st.integers(0, 1000),
    unit=st.sampled_from(["images", "samples"]),
    most=st.none() | st.integers(1, 5),
    order=st.randoms(use_true_random=False),
)
def test_splits_are_disjoint_by_image_and_do_not_depend_on_row_order(
    questions: int,
    sizes: tuple[int, int, int],
    spare: int,
    seed: int,
    unit: str,
    most: int | None,
    order: random.Random,
) -> None:
    samples = rows(sum(sizes) + spare, questions)
    wanted = sizes_of(*sizes, unit=unit, seed=seed, calibration_per_image=most)
    splits = make_splits([Region(SPLITS, tuple(samples))], wanted, "t")
    keys = [{sample.image_key for sample in splits[name]} for name in SPLITS]
    assert not keys[0] & keys[1] and not keys[0] & keys[2] and not keys[1] & keys[2]
    counts = [len(found) for found in keys] if unit == "images" else [len(splits[name]) for name in SPLITS]
    assert counts == list(sizes)
    about_one = [Counter(sample.image_key for sample in splits[name]).most_common(1)[0][1] for name in SPLITS]
    assert about_one[0] <= (most or questions) and max(about_one) <= questions
    if unit == "images":
        assert about_one == [min(most or questions, questions), questions, questions]
    order.shuffle(samples)
    assert make_splits([Region(SPLITS, tuple(samples))], wanted, "t") == splits


def test_a_larger_last_split_keeps_the_smaller_one_as_its_prefix() -> None:
    region = Region(SPLITS, tuple(rows(50, 3)))
    small = make_splits([region], sizes_of(5, 5, 10), "t")["held_out"]
    large = make_splits([region], sizes_of(5, 5, 30), "t")["held_out"]
    assert large[: len(small)] == small


def test_questions_on_one_image_stand_together_and_images_are_mixed() -> None:
    split = make_splits([Region(SPLITS, tuple(rows(300, 2)))], sizes_of(1, 200, 1), "t")["search"]
    numbers = [int(sample.image_key.removeprefix("key-")) for sample in split]
    assert numbers[::2] == numbers[1::2]
    # Not in the file's order: the first half of the split is a fair mix of low and high numbers.
    assert 0.35 < sum(number < 150 for number in numbers[:200]) / 200 < 0.65


def test_the_seed_changes_the_splits() -> None:
    region = Region(SPLITS, tuple(rows(60, 1)))
    first = make_splits([region], sizes_of(10, 20, 20, seed=0), "t")
    assert first != make_splits([region], sizes_of(10, 20, 20, seed=1), "t")


def test_an_image_of_an_earlier_region_is_not_used_again() -> None:
    calibration = Region(("calibration",), tuple(rows(5, 1)))
    rest = Region(("search", "held_out"), tuple(rows(15, 1)))
    splits = make_splits([calibration, rest], sizes_of(5, 5, 5), "t")
    assert len({sample.image_key for name in SPLITS for sample in splits[name]}) == 15


@pytest.mark.parametrize("unit", ["images", "samples"])
def test_too_few_images_is_said_with_numbers(unit: str) -> None:
    sizes = sizes_of(4, 4, 4, unit=unit)
    with pytest.raises(TaskError, match=rf"too few {unit} .*calibration 4 \+ search 4 \+ held_out 4 .*, 11 there"):
        make_splits([Region(SPLITS, tuple(rows(11, 1)))], sizes, "t")


@pytest.mark.parametrize("unit", ["images", "samples"])
@pytest.mark.parametrize("questions", [1, 4])
@pytest.mark.parametrize("most", [None, 1])
def test_the_sizes_proposed_where_there_are_too_few_fit(unit: str, questions: int, most: int | None) -> None:
    region = Region(SPLITS, tuple(rows(50, questions)))
    with pytest.raises(TaskError, match="these would fit: ") as refused:
        make_splits([region], sizes_of(50, 150, 300, unit=unit, calibration_per_image=most), "t")
    proposed = {name: int(size) for name, size in re.findall(r"(\w+): (\d+)", str(refused.value).partition("fit:")[2])}
    splits = make_splits([region], SplitSizes(**proposed, unit=unit, calibration_per_image=most), "t")
    assert all(len(splits[name]) >= size > 0 for name, size in proposed.items())


def test_no_sizes_are_proposed_where_none_fit() -> None:
    with pytest.raises(TaskError, match=r"by image\)$"):
        make_splits([Region(SPLITS, tuple(rows(2, 1)))], sizes_of(1, 1, 9), "t")


def test_easy_vqa_searches_only_images_that_models_were_not_trained_on() -> None:
    task = load_task("easy-vqa")
    train, test = set(easy_vqa.get_train_image_paths().values()), set(easy_vqa.get_test_image_paths().values())
    paths = {name: {s.image.path for s in task.split(name) if isinstance(s.image, ImageFile)} for name in SPLITS}
    assert paths["calibration"] < train
    assert len(paths["search"]) == len(paths["held_out"]) == 500
    assert paths["search"] | paths["held_out"] == test
    # Every question of the test images is there, with the answer the package gives.
    questions, answers, images = easy_vqa.get_test_questions()
    given_rows = sorted(zip(questions, answers, images, strict=True))
    found = [s for name in ("search", "held_out") for s in task.split(name)]
    assert sorted((s.question, s.answers[0], int(s.id.split("-")[1])) for s in found) == given_rows


def test_scenes_keep_evaluation_indices_away_from_training() -> None:
    task = load_task(load_spec("scenes").with_splits(calibration=5, search=6, held_out=7))
    indices = {name: {s.image.index for s in task.split(name) if isinstance(s.image, SceneImage)} for name in SPLITS}
    assert max(indices["calibration"]) < 1_000_000 <= min(indices["search"] | indices["held_out"])
    assert [len(indices[name]) for name in SPLITS] == [5, 6, 7]
    assert not indices["search"] & indices["held_out"]
    assert task.search[0].image.open().mode == "RGB"


def test_hashes_follow_what_they_name() -> None:
    spec = load_spec("easy-vqa").with_splits(calibration=3, search=3, held_out=3)
    base, larger = load_task(spec), load_task(spec.with_splits(calibration=3, search=3, held_out=4))
    assert base == load_task(spec)
    assert (larger.data_hash, larger.definition_hash) == (base.data_hash, base.definition_hash)
    assert larger.split_hash != base.split_hash
