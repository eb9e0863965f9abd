"""Rendered texts: determinism, what is drawn and where, and the numbers that training never sees."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from workers.tasks.images import RenderedImage
from workers.tasks.loading import load_task
from workers.tasks.rendered import PROMPT, SIZES, WORDS, is_reserved, rendered_text
from workers.tasks.scenes import FIRST_EVALUATION_INDEX
from workers.tasks.spec import load_spec
from workers.tasks.splits import SPLITS

indices = st.integers(0, 2_000_000)
seeds = st.integers(0, 2**31)


def ink_mask(image):
    """Where an image differs from its corner, which no text reaches."""
    pixels = np.asarray(image).astype(int)
    return np.abs(pixels - pixels[0, 0]).sum(axis=2) > 0


def luminance(colour):
    """Rec. 601 luma of RGB bytes."""
    return float(np.dot(colour, [0.299, 0.587, 0.114]))


@given(indices, seeds)
@settings(max_examples=60, deadline=None)
def test_the_text_lies_inside_the_image_within_its_box(index, seed):
    drawn = rendered_text(index, seed)
    assert (drawn.image.size, drawn.image.mode) == ((64, 64), "RGB")
    rows, columns = np.nonzero(ink_mask(drawn.image))
    left, top, right, bottom = drawn.box
    assert 0 < left <= columns.min() and columns.max() < right < 64
    assert 0 < top <= rows.min() and rows.max() < bottom < 64
    assert list(drawn.centres) == sorted(drawn.centres)
    assert len(drawn.centres) == len(drawn.text)
    assert left < drawn.centres[0] and drawn.centres[-1] < right


@given(indices, seeds)
@settings(max_examples=40, deadline=None)
def test_the_image_shows_the_text_and_no_other_one(index, seed):
    """Drawn again at its place in every size, only the text itself covers the same pixels."""
    drawn = rendered_text(index, seed)
    shown = ink_mask(drawn.image)
    others = [*WORDS[:20], "17", "2048"]

    def covers(text):
        for size in SIZES:
            canvas = Image.new("L", (64, 64), 0)
            font = ImageFont.load_default(size).font_variant(layout_engine=ImageFont.Layout.BASIC)
            edges = font.getbbox(text)
            ImageDraw.Draw(canvas).text((drawn.box[0] - edges[0], drawn.box[1] - edges[1]), text, font=font, fill=255)
            # Faint edges vanish where ink and background are near each other; what is strong must agree.
            strong = np.asarray(canvas) > 64
            if (strong & ~shown).sum() == 0 and (shown & (np.asarray(canvas) == 0)).sum() == 0:
                return True
        return False

    assert covers(drawn.text)
    assert not any(covers(other) for other in others if other != drawn.text)


def test_text_and_background_differ_in_brightness():
    for index in range(100):
        pixels = np.asarray(rendered_text(index, 0).image).reshape(-1, 3)
        lumas = [luminance(pixel) for pixel in pixels]
        assert max(lumas) - min(lumas) > 60


def test_an_index_always_gives_the_same_image_and_other_ones_another():
    first, again = rendered_text(7, 3), rendered_text(7, 3)
    assert (first.text, first.image.tobytes()) == (again.text, again.image.tobytes())
    images = {rendered_text(index, seed).image.tobytes() for index in range(40) for seed in (0, 1)}
    assert len(images) == 80


def test_words_and_numbers_come_in_the_stated_shares():
    texts = [rendered_text(index, 0).text for index in range(4000)]
    numbers = [text for text in texts if text.isdigit()]
    assert len(numbers) / len(texts) == pytest.approx(0.5, abs=0.03)
    lengths = Counter(map(len, numbers))
    assert set(lengths) == {1, 2, 3, 4}
    assert all(count / len(numbers) == pytest.approx(0.25, abs=0.04) for count in lengths.values())
    assert all(text == str(int(text)) for text in numbers)
    assert set(texts) - set(numbers) == set(WORDS)


def test_words_are_short_and_each_is_there_once():
    assert len(WORDS) == len(set(WORDS)) == 236
    assert all(word.isascii() and word.islower() and 3 <= len(word) <= 4 for word in WORDS)


def test_a_quarter_of_the_longer_numbers_is_kept_for_evaluation():
    reserved = {number for number in range(10_000) if is_reserved(number)}
    assert min(reserved) >= 100
    assert len(reserved) / 9900 == pytest.approx(0.25, abs=0.02)
    trained = {rendered_text(index, 0).text for index in range(6000)}
    assert not {int(text) for text in trained if text.isdigit()} & reserved
    evaluated = [rendered_text(FIRST_EVALUATION_INDEX + index, 0).text for index in range(2000)]
    longer = [int(text) for text in evaluated if text.isdigit() and len(text) > 2]
    assert np.mean([number in reserved for number in longer]) == pytest.approx(0.25, abs=0.06)


def test_a_negative_index_is_refused():
    with pytest.raises(ValueError, match="text index -1 is negative"):
        rendered_text(-1, 0)


def test_the_bundled_task_asks_for_the_text_and_keeps_evaluation_away_from_training():
    task = load_task(load_spec("rendered-text").with_splits(calibration=5, search=6, held_out=7))
    assert task.spec.prompt == PROMPT
    images = {name: [sample.image for sample in task.split(name)] for name in SPLITS}
    assert [len(images[name]) for name in SPLITS] == [5, 6, 7]
    assert all(isinstance(image, RenderedImage) for name in SPLITS for image in images[name])
    assert max(image.index for image in images["calibration"]) < FIRST_EVALUATION_INDEX
    evaluated = [image.index for name in ("search", "held_out") for image in images[name]]
    assert min(evaluated) >= FIRST_EVALUATION_INDEX and len(set(evaluated)) == 13
    for sample in task.held_out:
        drawn = rendered_text(sample.image.index, 0)
        assert sample.answers == (drawn.text,)
        assert sample.image.open().tobytes() == drawn.image.tobytes()
    assert task.data_hash != load_task(task.spec.changed(source=task.spec.source.changed(seed=1))).data_hash
