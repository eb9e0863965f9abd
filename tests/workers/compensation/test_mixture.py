"""Maps fitted on task samples and general text, held against numpy's lstsq over both, and the text itself."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing

from workers.compensation.calibration import Calibration, GeneralText, calibrate
from workers.compensation.compensator import Compensator
from workers.compensation.fit import fit
from workers.compensation.general_text import windows
from workers.compensation.recipe import CompensationError, Recipe
from workers.compensation.shared import SharedFits
from workers.layerwise.decoder import Decoder
from workers.messages import FitCompensation
from workers.models.loading import LoadedModel
from workers.runtime import SkipPlan, apply
from workers.runtime.locate import locate
from workers.tasks import Task

SHARE = 0.25
TEXT = "the red circle is over the blue triangle and nothing else is in the image today. " * 30
ID = hashlib.sha256(TEXT.encode()).hexdigest()[:16]
OWN = Recipe.parse(f"linear tokens=600 text_share={SHARE}")
GIVEN = Recipe.parse(f"linear tokens=600 text_share={SHARE} text_id={ID}")
PLAN = SkipPlan.parse("RRSSRR")
LAYER, END = 1, 3


@pytest.fixture(scope="module")
def mixed(tiny: LoadedModel, small_task: Task) -> Calibration:
    text = GeneralText(windows(tiny, GIVEN, TEXT), SHARE)
    return calibrate(tiny, small_task, tokens=450, text=text)


def test_a_mixture_gets_the_map_that_lstsq_finds(tiny: LoadedModel, small_task: Task, mixed: Calibration) -> None:
    """States, targets and weights are gathered anew: the task's from its batches, the text's from its tokens."""
    own = fit(tiny.model, mixed, PLAN, GIVEN).maps[LAYER]
    layers = list(locate(tiny.model).layers)
    rows = []
    for number, batch in enumerate(mixed.batches):
        seen: dict[str, torch.Tensor] = {}
        hooks = [
            layers[LAYER].mlp.register_forward_hook(lambda m, a, out, seen=seen: seen.update(output=out)),
            layers[LAYER].register_forward_hook(lambda m, a, out, seen=seen: seen.update(state=out)),
            layers[END].register_forward_hook(lambda m, a, out, seen=seen: seen.update(target=out)),
        ]
        with torch.no_grad():
            locate(tiny.model).owner(*batch.args, **batch.kwargs)
        for hook in hooks:
            hook.remove()
        taken = {name: each.flatten(0, 1)[batch.kept].double().numpy() for name, each in seen.items()}
        answers, vision = batch.kept_answers.numpy(), batch.kept_vision.numpy()
        kind = np.where(answers, 2, np.where(vision, 0, 1)) if not batch.general else np.full(len(answers), 3)
        assert batch.general == (number >= len(mixed.batches) - 1)
        rows.append((taken["output"], taken["state"], taken["target"], kind))
    output, state, target, kind = (np.concatenate(each) for each in zip(*rows, strict=True))
    total = [(1 - SHARE) / 3] * 3 + [SHARE]
    weights = sum(part * (kind == number) / (kind == number).sum() for number, part in enumerate(total))
    weights = (weights / (target**2).mean(1))[:, None]
    pull = np.sqrt(GIVEN.ridge * np.mean((weights * output**2).sum(0))) * np.eye(output.shape[1])
    wanted = np.vstack([np.sqrt(weights) * (target - state + output), pull])
    expected = np.linalg.lstsq(np.vstack([np.sqrt(weights) * output, pull]), wanted, rcond=None)[0]
    np.testing.assert_allclose(own.matrix.numpy(), expected, atol=1e-4 * np.abs(expected).max())
    alone = fit(tiny.model, calibrate(tiny, small_task, tokens=450), PLAN, Recipe.parse("linear")).maps[LAYER]
    assert np.abs(alone.matrix.numpy() - expected).max() > 1e-2 * np.abs(expected).max()


@pytest.mark.parametrize("plan", ["RRSSRR", "RSRRSR", "RRSFRR", "RBSRRS"])
def test_plans_fitted_together_get_the_same_maps(tiny: LoadedModel, mixed: Calibration, plan: str) -> None:
    """Text without an image passes frozen and bypassed layers as it passes others."""
    recipe = Recipe.parse(f"{GIVEN.text} drift=yes")
    alone = fit(tiny.model, mixed, SkipPlan.parse(plan), recipe)
    together = SharedFits(Decoder(tiny.model), mixed, recipe).fit(SkipPlan.parse(plan))
    assert alone.maps.keys() == together.maps.keys()
    assert all(torch.equal(alone.maps[layer].matrix, together.maps[layer].matrix) for layer in alone.maps)


def test_the_tokens_are_divided_by_the_share(tiny: LoadedModel, small_task: Task) -> None:
    compensator = Compensator(tiny, small_task)
    fitted = compensator.fit(FitCompensation(PLAN.text, GIVEN.text, TEXT))
    assert fitted.text_tokens == 150 and fitted.tokens - fitted.text_tokens < 600
    plain = compensator.fit(FitCompensation(PLAN.text, "linear tokens=450"))
    assert (plain.text_tokens, plain.tokens, plain.samples) == (0, fitted.tokens - 150, fitted.samples)


def test_the_model_samples_its_own_text_the_same_for_a_seed(tiny: LoadedModel) -> None:
    found = windows(tiny, OWN, None)
    state = torch.get_rng_state()
    again = windows(tiny, OWN, None)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(found) == 1 and [len(each) for each in found] == [150]
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
    other = windows(tiny, Recipe.parse(f"{OWN.text} seed=1"), None)
    assert not torch.equal(found[0], other[0])
    special = set(tiny.processor.tokenizer.all_special_ids)
    assert not special.intersection(torch.cat([*found, *other]).tolist())


def test_sampled_tokens_are_drawn_from_the_models_distribution(tiny: LoadedModel) -> None:
    """On average a sampled token is as surprising as the distribution's entropy says; greedy ones are far less."""
    many = Recipe.parse("linear tokens=4000 text_share=0.5")
    special = torch.tensor(tiny.processor.tokenizer.all_special_ids)
    surprise, entropy = [], []
    with torch.inference_mode():
        for window in windows(tiny, many, None):
            logits = tiny.model(input_ids=window[None]).logits[0, :-1].float()
            logits[:, special] = -torch.inf
            logits = logits.log_softmax(-1)
            surprise.append(-logits.gather(1, window[1:, None])[:, 0])
            entropy.append(-(logits.exp() * logits.clamp(min=-1e4)).sum(-1))
    drawn, expected = torch.cat(surprise), torch.cat(entropy)
    error = float((drawn - expected).std()) / len(drawn) ** 0.5
    assert abs(float((drawn - expected).mean())) < 4 * error < 0.5 * float(expected.mean())


def test_a_given_text_is_read_window_by_window(tiny: LoadedModel) -> None:
    found = windows(tiny, Recipe.parse(f"linear tokens=1200 text_share=0.5 text_id={ID}"), TEXT)
    ids = tiny.processor.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert torch.cat(found).tolist()[:600] == ids[:600] and max(map(len, found)) <= 256


def test_windows_of_a_text_begin_as_the_tokenizer_begins_one(tiny: LoadedModel) -> None:
    """The tokenizer of the tiny model begins a text with nothing, those of most models with one token."""
    processor = copy.copy(tiny.processor)
    processor.tokenizer = copy.deepcopy(tiny.processor.tokenizer)
    begin = processor.tokenizer.convert_tokens_to_ids("<s>")
    processor.tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    assert processor.tokenizer("")["input_ids"] == [begin]
    found = windows(replace(tiny, processor=processor), GIVEN, TEXT)
    ids = tiny.processor.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert [each.tolist() for each in found] == [[begin, *ids[:149]]]
    recipe = Recipe.parse(f"linear tokens=1200 text_share=0.5 text_id={ID}")
    found = windows(replace(tiny, processor=processor), recipe, TEXT)
    assert all(len(each) <= 256 and each[0] == begin for each in found) and sum(map(len, found)) >= 600
    assert torch.cat([each[1:] for each in found]).tolist() == ids[: sum(len(each) - 1 for each in found)]


def test_texts_that_are_not_the_recipes_are_refused(tiny: LoadedModel) -> None:
    for text in (None, TEXT + " "):
        with pytest.raises(CompensationError, match=f"general text {ID} of the maps' recipe is not the one at hand"):
            windows(tiny, GIVEN, text)
    many = Recipe.parse(f"linear tokens=100000 text_share=0.5 text_id={ID}")
    with pytest.raises(CompensationError, match=r"fewer than the 50000 that text_share 0\.5 of 100000 tokens asks for"):
        windows(tiny, many, TEXT)


def test_an_image_token_written_in_a_text_is_no_image(tiny: LoadedModel) -> None:
    text = "what <image> shape is green? " * 80
    recipe = Recipe.parse(f"linear tokens=400 text_share=0.5 text_id={hashlib.sha256(text.encode()).hexdigest()[:16]}")
    assert tiny.model.config.image_token_id not in torch.cat(windows(tiny, recipe, text)).tolist()


def test_a_recipe_names_its_mixture() -> None:
    assert GIVEN.text == f"linear ridge=0.001 weighting=answers tokens=600 text_share=0.25 text_id={ID}"
    assert Recipe.parse(GIVEN.text) == GIVEN and "text" not in Recipe.parse("linear text_share=0").text
    for bad, reason in (
        ("text_share=1", "from 0 to below 1"),
        ("text_share=nan", "from 0 to below 1"),
        (f"text_id={ID}", "needs a text_share"),
        ("text_share=0.5 text_id=LICENSE", "16 hexadecimal digits"),
    ):
        with pytest.raises(CompensationError, match=reason):
            Recipe.parse(f"linear {bad}")


def test_less_divergence_on_text_like_the_mixtures(tiny: LoadedModel, small_task: Task, mixed: Calibration) -> None:
    """The point of it: held-out text of the same kind is followed better."""
    held_out = torch.tensor(
        tiny.processor.tokenizer("is there a green triangle under the circle in the image? " * 4)["input_ids"]
    )[None]
    with torch.inference_mode():
        dense = tiny.model(input_ids=held_out).logits.log_softmax(-1)
        found = []
        for calibration, recipe in ((mixed, GIVEN), (calibrate(tiny, small_task, tokens=450), Recipe.parse("linear"))):
            maps = fit(tiny.model, calibration, PLAN, recipe).maps
            with apply(tiny.model, PLAN, maps):
                own = tiny.model(input_ids=held_out).logits.log_softmax(-1)
            found.append(float((dense.exp() * (dense - own)).sum(-1).mean()))
    assert found[0] < found[1]
