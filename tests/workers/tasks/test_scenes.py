"""Scenes: determinism, the captions' grammar, and the pixels against the captions."""

import itertools
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.tasks.loading import load_task
from workers.tasks.scenes import COLOURS, IMAGE_SIZE, QUESTIONS, SHAPES, scene
from workers.tasks.spec import load_spec

PHRASE = rf"a (?P<colour>{'|'.join(COLOURS)}) (?P<shape>{'|'.join(SHAPES)})"
CAPTION = re.compile(
    rf"{PHRASE}(?: (left of|above) {PHRASE}){{1,2}}".replace("?P<colour>", "").replace("?P<shape>", "")
)

indices = st.integers(0, 2_000_000)
seeds = st.integers(0, 2**31)


def parse(caption):
    """Objects and relations that a caption speaks of, by a parser of its own."""
    words = re.split(r" (left of|above) ", caption)
    return [tuple(phrase.split()[1:]) for phrase in words[0::2]], words[1::2]


def pixel_groups(image):
    """Connected groups of non-background pixels, 8-connected: list of arrays [pixels, (row, column)]."""
    pixels = np.asarray(image).astype(int)
    shown = (np.abs(pixels - pixels[0, 0]).sum(axis=2)) > 0
    label = np.zeros(shown.shape, dtype=int)
    groups = []
    for start in zip(*np.nonzero(shown), strict=True):
        if label[start]:
            continue
        group, queue = [], [start]
        label[start] = len(groups) + 1
        while queue:
            row, column = queue.pop()
            group.append((row, column))
            for near in ((row + down, column + right) for down in (-1, 0, 1) for right in (-1, 0, 1)):
                inside = 0 <= near[0] < IMAGE_SIZE and 0 <= near[1] < IMAGE_SIZE
                if inside and shown[near] and not label[near]:
                    label[near] = len(groups) + 1
                    queue.append(near)
        groups.append(np.array(group))
    return groups


def dominant_colour(image, group):
    """The palette's name nearest to the colour most of the group's pixels have."""
    pixels = np.asarray(image)
    common, _ = Counter(tuple(int(part) for part in pixels[row, column]) for row, column in group).most_common(1)[0]
    return min(COLOURS, key=lambda name: sum((a - b) ** 2 for a, b in zip(COLOURS[name], common, strict=True)))


@given(indices, seeds)
@settings(max_examples=40, deadline=None)
def test_a_scene_depends_on_index_and_seed_alone(index, seed):
    first, second = scene(index, seed), scene(index, seed)
    assert first.caption == second.caption
    assert first.image.tobytes() == second.image.tobytes()
    assert first.image.size == (IMAGE_SIZE, IMAGE_SIZE) and first.image.mode == "RGB"


def test_known_scene_stays_the_same():
    """Trained models and stored results refer to scenes by index: the generator must never drift."""
    assert scene(0, 0).caption == "a gray square left of a yellow circle"
    assert scene(1, 0).caption == "a green triangle left of a teal square left of a red square"


def test_different_indices_and_seeds_differ():
    images = {scene(index, seed).image.tobytes() for index in range(50) for seed in range(4)}
    assert len(images) == 200


@given(indices, seeds)
@settings(max_examples=100, deadline=None)
def test_captions_follow_the_grammar(index, seed):
    drawn = scene(index, seed)
    assert CAPTION.fullmatch(drawn.caption)
    objects, relations = parse(drawn.caption)
    assert len(set(relations)) == 1 and len(objects) == len(relations) + 1
    assert objects == [(shape.colour, shape.shape) for shape in drawn.shapes]


@given(indices, seeds)
@settings(max_examples=60, deadline=None)
def test_pixels_show_what_the_caption_says(index, seed):
    drawn = scene(index, seed)
    objects, relations = parse(drawn.caption)
    groups = pixel_groups(drawn.image)
    assert len(groups) == len(objects), "shapes touch or one is missing"
    axis = 1 if relations[0] == "left of" else 0
    groups.sort(key=lambda group: group[:, axis].mean())
    assert [dominant_colour(drawn.image, group) for group in groups] == [colour for colour, _ in objects]
    for before, after in itertools.pairwise(groups):
        assert before[:, axis].max() < after[:, axis].min(), "shapes overlap along the axis of the caption"
    for number, before in enumerate(groups):
        for after in groups[number + 1 :]:
            along = after[:, axis].mean() - before[:, axis].mean()
            across = abs(after[:, 1 - axis].mean() - before[:, 1 - axis].mean())
            assert across < 0.75 * along, "the other axis could be read as well"


@given(indices, seeds)
@settings(max_examples=60, deadline=None)
def test_outlines_are_those_of_the_shapes(index, seed):
    """Covered area over the square of the largest distance from the centroid tells the three shapes apart."""
    drawn = scene(index, seed)
    objects, relations = parse(drawn.caption)
    axis = 1 if relations[0] == "left of" else 0
    groups = sorted(pixel_groups(drawn.image), key=lambda group: group[:, axis].mean())
    background = np.asarray(drawn.image)[0, 0].astype(float)
    pixels = np.asarray(drawn.image).astype(float)
    for group, (colour, shape), truth in zip(groups, objects, drawn.shapes, strict=True):
        contrast = np.abs(np.array(truth.fill) - background).sum()
        cover = np.abs(pixels[group[:, 0], group[:, 1]] - background).sum(axis=1) / contrast
        area = cover.sum() / truth.radius**2
        expected = {"circle": np.pi, "square": 2.0, "triangle": 3 * np.sqrt(3) / 4}[shape]
        assert area == pytest.approx(expected, rel=0.12), (colour, shape)


def test_both_relations_and_both_counts_occur_often():
    scenes = [scene(index, 0) for index in range(600)]
    assert 0.4 < sum(drawn.relation == "above" for drawn in scenes) / 600 < 0.6
    assert 0.2 < sum(len(drawn.shapes) == 3 for drawn in scenes) / 600 < 0.4
    phrases = Counter(shape.phrase for drawn in scenes for shape in drawn.shapes)
    assert len(phrases) == len(COLOURS) * len(SHAPES)


def test_negative_indices_are_refused():
    with pytest.raises(ValueError, match="-1 is negative"):
        scene(-1, 0)


@given(indices, seeds)
@settings(max_examples=60, deadline=None)
def test_a_description_says_what_the_caption_says_in_sentences(index, seed):
    drawn = scene(index, seed)
    shapes, relations = parse(drawn.caption)
    opening, *rest = re.fullmatch(r"(.*)\.", QUESTIONS["description"].answer(drawn))[1].split(". ")
    line = "row, from left to right" if relations[0] == "left of" else "column, from top to bottom"
    assert opening == f"There are {['two', 'three'][len(shapes) - 2]} shapes in a {line}"
    assert [tuple(sentence.split()[-2:]) for sentence in rest[: len(shapes)]] == shapes
    assert [sentence.split()[1] for sentence in rest[: len(shapes)]] == ["first", "second", "third"][: len(shapes)]
    told = [re.fullmatch(r"The (\w+) (\w+) is (.+) the (\w+) (\w+)", each).groups() for each in rest[len(shapes) :]]
    expected = zip(shapes, relations, shapes[1:], strict=False)
    assert told == [(*first, relation, *second) for first, relation, second in expected]


def test_scenes_are_counted():
    answers = {index: QUESTIONS["count"].answer(scene(index, 0)) for index in range(40)}
    assert answers == {index: {2: "two", 3: "three"}[len(scene(index, 0).shapes)] for index in range(40)}
    assert set(answers.values()) == {"two", "three"}


@pytest.mark.parametrize(
    ("name", "question"), [("scenes", "caption"), ("scene-descriptions", "description"), ("scene-counts", "count")]
)
def test_a_bundled_task_asks_its_question_and_accepts_its_answer(name, question):
    task = load_task(load_spec(name).with_splits(calibration=2, search=2, held_out=2))
    assert task.spec.prompt == QUESTIONS[question].prompt
    for sample in (*task.calibration, *task.held_out):
        drawn = scene(int(sample.id.removeprefix("scene-")), 0)
        assert sample.answers == (QUESTIONS[question].answer(drawn),)
