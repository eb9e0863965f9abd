"""Training: reproducible by seed, resumable, and its parts against independent references."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from reference_training.data import (
    EASY_VQA_SHAPES,
    EasyVqaImage,
    YesNoQuestions,
    easy_vqa_images,
    easy_vqa_training_images,
    open_images,
)
from reference_training.model import Architecture, build_model
from workers.tasks.scenes import COLOURS, scene

from . import train
from .batches import easy_batches
from .optimisation import Optimiser, Schedule
from .packing import Packer
from .recipe import RECIPE, Training, VisionTraining
from .train import reference_processor, second_half, train_model
from .vision import (
    COLOUR_LABELS,
    IGNORED,
    SHAPE_LABELS,
    LabelledImages,
    label_easy_vqa,
    label_scenes,
    patch_labels,
    shift_and_flip,
    train_vision,
)

TINY = Architecture(
    vision_width=16,
    vision_layers=1,
    vision_heads=2,
    vision_inner=16,
    text_width=16,
    text_layers=2,
    text_heads=2,
    text_inner=16,
)


class Interrupting:
    """Stands where a development set does and stops the training, as a killed process would be."""

    def accuracy(self, model):
        raise KeyboardInterrupt


@pytest.fixture(scope="module")
def train_tiny():
    """A function that trains a tiny model for a few steps in a directory and returns its weights."""
    processor = reference_processor()
    images = easy_vqa_training_images()[:24]

    def train(output, seed=0, development=None):
        output.mkdir(exist_ok=True)
        training = Training(
            "tiny",
            steps=4,
            rate=1e-2,
            warmup=1,
            decay=0.5,
            easy_images=6,
            scenes=5,
            question_weight=0.5,
            save_every=2,
            seed=seed,
        )
        model = build_model(processor.tokenizer, TINY, seed)
        train_model(model, processor, training, TINY, output, images, development or {})
        return {name: weight.detach().clone() for name, weight in model.named_parameters()}

    return train


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow  # a trained model is bundled: only who trains another one needs it
def test_training_depends_on_the_seed_alone(train_tiny, tmp_path):
    assert same(train_tiny(tmp_path / "first"), train_tiny(tmp_path / "second"))


@pytest.mark.slow
def test_another_seed_is_another_training(train_tiny, tmp_path):
    assert not same(train_tiny(tmp_path / "first"), train_tiny(tmp_path / "other", seed=1))


@pytest.mark.slow
def test_interrupted_training_goes_on_where_it_was_stopped(train_tiny, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    first = train_tiny(tmp_path / "first")
    with pytest.raises(KeyboardInterrupt):
        train_tiny(tmp_path / "second", development={"stop": Interrupting()})
    assert not any("going on" in message for message in caplog.messages)
    resumed = train_tiny(tmp_path / "second")
    assert "going on from step 2" in caplog.messages
    assert same(first, resumed)


def test_vision_training_depends_on_the_seed_alone_and_learns():
    images = easy_vqa_training_images()[:40]
    development = {"easy-vqa": label_easy_vqa(images[:8])}

    def weights(seed):
        training = VisionTraining(epochs=2, scenes_per_epoch=24, batch=16, rate=1e-2, seed=seed)
        return train_vision(training, TINY, images, development)

    first = weights(0)
    assert same(first, weights(0))
    assert not same(first, weights(1))
    assert "encoder.layers.0.self_attn.q_proj.weight" in {name.removeprefix("vision_model.") for name in first}


def test_the_schedule_does_not_depend_on_the_length_before_the_decay():
    short, long = (Schedule(2e-3, warmup=10, total=total, decay=0.4) for total in (100, 400))
    assert short.rate(0) == pytest.approx(2e-4)
    assert [short.rate(step) for step in range(61)] == [long.rate(step) for step in range(61)]
    assert short.rate(30) == 2e-3 and short.rate(80) == pytest.approx(1e-3) and short.rate(100) == 0.0


def test_the_optimiser_is_adamw_with_clipping_and_an_average():
    torch.manual_seed(0)
    module = nn.Linear(6, 5)
    start = {name: weight.detach().clone() for name, weight in module.named_parameters()}
    schedule = Schedule(1e-2, warmup=2, total=1000, decay=0.4)
    optimiser = Optimiser(module, schedule, slow={"bias": 0.5}, weight_decay=0.1, average_decay=0.6)
    moments = {name: (torch.zeros_like(w), torch.zeros_like(w)) for name, w in start.items()}
    averages = {name: weight.clone() for name, weight in start.items()}
    for step in range(5):
        gradients = {name: torch.randn_like(weight).bfloat16() for name, weight in start.items()}
        for name, weight in module.named_parameters():
            weight.grad = gradients[name].clone()
        norm = torch.cat([gradient.float().flatten() for gradient in gradients.values()]).norm()
        assert optimiser.step() == pytest.approx(float(norm), rel=1e-5)
        average_decay = min(0.6, (step + 1) / (step + 11))
        for name, weight in start.items():
            gradient = gradients[name].float() * min(1.0, 1.0 / float(norm))
            mean, square = moments[name]
            mean.mul_(0.9).add_(gradient, alpha=0.1)
            square.mul_(0.98).add_(gradient**2, alpha=0.02)
            rate = schedule.rate(step) * (0.5 if name == "bias" else 1.0)
            weight.mul_(1 - rate * (0.1 if name == "weight" else 0.0))
            denominator = (square / (1 - 0.98 ** (step + 1))).sqrt() + 1e-8
            weight.sub_(rate * mean / (1 - 0.9 ** (step + 1)) / denominator)
            averages[name] = average_decay * averages[name] + (1 - average_decay) * weight
    for name, weight in module.named_parameters():
        assert weight.dtype == torch.bfloat16
        torch.testing.assert_close(weight.float(), start[name].bfloat16().float(), rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(optimiser.averaged()[name], averages[name], rtol=1e-4, atol=1e-5)


def test_shapes_and_colours_told_by_questions_are_those_in_the_image():
    images = easy_vqa_images("train")[:400]
    told = [image.shape_and_colour for image in images]
    for pixels, (_, colour) in zip(open_images(images), told, strict=True):
        if colour:
            exact = np.array(COLOURS[colour])[:, None, None]
            assert (pixels == exact).all(axis=0).sum() >= 9
    assert sum(bool(shape) for shape, _ in told) > 320
    assert {shape for shape, _ in told} == {"", *EASY_VQA_SHAPES}


def test_negated_questions_are_understood():
    def told(question, answer):
        return EasyVqaImage(0, "", (question,), (answer,)).shape_and_colour

    assert told("is there not a red shape?", "no") == ("", "red")
    assert told("is there not a red shape?", "yes") == ("", "")
    assert told("is no circle present?", "no") == ("circle", "")
    assert told("does the image contain a circle?", "no") == ("", "")
    assert told("what color is the circle?", "teal") == ("circle", "teal")
    assert told("what is the blue shape?", "rectangle") == ("rectangle", "blue")


def by_hand(labelled, row):
    """Patch labels counted pixel by pixel."""
    shapes, colours = [], []
    counts = np.zeros((64, 4), dtype=int)
    for y in range(64):
        for x in range(64):
            counts[(y // 8) * 8 + x // 8, labelled.owners[row, y, x]] += 1
    most = counts.max(axis=0)
    for patch in counts:
        owner = int(patch[1:].argmax()) + 1 if patch[1:].any() else 0
        grazed = owner and patch[owner] < 6.4 and patch[owner] < most[owner]
        shapes.append(IGNORED if grazed else labelled.shapes[row, owner])
        colours.append(IGNORED if grazed else labelled.colours[row, owner])
    return shapes, colours


def test_patch_labels_are_those_counted_by_hand():
    labelled = label_scenes([scene(index, 0) for index in range(12)])
    shapes, colours = patch_labels(labelled)
    for row in range(12):
        expected_shapes, expected_colours = by_hand(labelled, row)
        assert shapes[row].tolist() == expected_shapes
        assert colours[row].tolist() == expected_colours


def test_easy_vqa_labels_name_the_one_shape():
    images = easy_vqa_images("train")[:6]
    shapes, colours = patch_labels(label_easy_vqa(images))
    for row, image in enumerate(images):
        shape, colour = image.shape_and_colour
        assert set(shapes[row]) - {0, IGNORED} == {SHAPE_LABELS.index(shape)}
        assert set(colours[row]) - {0, IGNORED} == {COLOUR_LABELS.index(colour)}


def test_moved_images_keep_pixels_and_owners_together():
    labelled = label_scenes([scene(index, 0) for index in range(8)])
    moved = shift_and_flip(labelled, np.random.default_rng(0))
    assert isinstance(moved, LabelledImages)
    assert not np.array_equal(moved.pixels, labelled.pixels)
    for row in range(8):
        nothing = moved.owners[row] == 0
        for number, shape in enumerate(scene(row, 0).shapes, start=1):
            inside = moved.pixels[row][:, moved.owners[row] == number]
            if inside.shape[1] > 20:
                assert (inside == np.array(shape.fill)[:, None]).all(axis=0).mean() > 0.5
        assert (moved.pixels[row][:, nothing] == labelled.backgrounds[row][:, None]).all(axis=0).mean() > 0.95


def test_processor_pixels_are_those_of_training():
    from .vision import to_input

    image = Image.open(easy_vqa_training_images()[0].path)
    pixels = reference_processor().image_processor(image, return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels.bfloat16(), to_input(open_images(easy_vqa_training_images()[:1])))


def test_balanced_questions_are_answered_as_the_data_set_answers_them():
    images = easy_vqa_training_images()
    bank = YesNoQuestions(images)
    rng = np.random.default_rng(0)
    known = {(image.image_id, q): a for image in images for q, a in zip(image.questions, image.answers, strict=True)}
    asked = [(image.image_id, pair) for image in images[:1500] for pair in bank.balanced(image, rng)]
    shared = [known[image_id, q] == a for image_id, (q, a) in asked if (image_id, q) in known]
    assert len(shared) > 200 and all(shared)
    negated = [answer for _, (question, answer) in asked if {"not", "no"} & set(question.split())]
    affirmative = [answer for _, (question, answer) in asked if not {"not", "no"} & set(question.split())]
    assert 0.35 < affirmative.count("yes") / len(affirmative) < 0.45
    assert 0.45 < negated.count("yes") / len(negated) < 0.55
    assert 2.2 < len(affirmative) / len(negated) < 2.8


def test_the_recipe_never_reaches_evaluation_scenes_and_ends_with_a_decay():
    assert all(400_000 + phase.steps * phase.scenes < 990_000 for phase in RECIPE)
    assert [phase.decay for phase in RECIPE[:-1]] == [0.0] * (len(RECIPE) - 1)
    assert RECIPE[-1].decay > 0


def test_without_scenes_the_second_half_sees_other_images(monkeypatch):
    images = easy_vqa_training_images()[:60]
    monkeypatch.setattr(train, "easy_vqa_training_images", lambda: images)
    training = Training("alone", steps=2, easy_images=3, scenes=0)
    _, batches = second_half(TINY, training, 0)
    processor = reference_processor()
    packer = Packer(processor, TINY.vision_tokens)
    first, first_pixels = next(easy_batches(images, label_easy_vqa(images), packer, training, 0))
    second, second_pixels = next(batches)
    assert len(second.tokens) == len(first.tokens) == 3
    assert not torch.equal(first_pixels, second_pixels)
