"""Compensated plans evaluated: the trie against the plain path with folded weights, kept maps against fitted ones."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from workers.compensation import store
from workers.compensation.artifact import decode
from workers.compensation.recipe import CompensationError, Recipe
from workers.evaluation.dispatch import EvaluationDispatch
from workers.evaluation.plain import PlainEvaluator
from workers.messages import EvaluatePlans, Evaluation, EvaluationFailure, FitCompensation
from workers.models.loading import LoadedModel
from workers.runtime import SkipPlan, apply
from workers.tasks import Task

LINEAR = "linear ridge=0.001 weighting=answers tokens=200"


@pytest.fixture(scope="module")
def evaluators(tiny: LoadedModel, small_task: Task) -> EvaluationDispatch:
    return EvaluationDispatch(PlainEvaluator(tiny, small_task, batch_size=4), memory_bytes=1 << 28)


@pytest.mark.parametrize("letters", ["RRSSF", "RSAMQP"])
@pytest.mark.parametrize("recipe", [LINEAR, f"{LINEAR} drift=yes", f"{LINEAR} scope=projection"])
def test_the_trie_scores_compensated_plans_as_the_plain_path_does(
    evaluators: EvaluationDispatch, recipe: str, letters: str
) -> None:
    generator = random.Random(3)
    plans = tuple({"".join(generator.choice(letters) for _ in range(5)) + "R" for _ in range(8)})
    asked = {"plans": plans, "split": "search", "n_samples": 40, "compensation": recipe}
    fast, plain = (evaluators.evaluate(EvaluatePlans(**asked, path=path)) for path in ("fast", "plain"))
    for one, other in zip(fast.results, plain.results, strict=True):
        assert isinstance(one, Evaluation) and isinstance(other, Evaluation)
        assert one.path == "fast" and other.path == "plain"
        assert one.compensation == other.compensation == recipe
        assert one.scores == other.scores and one.failed_samples == other.failed_samples == {}
    uncompensated = evaluators.evaluate(EvaluatePlans(plans, "search", 40, path="fast"))
    by_plan = dict(zip(plans, uncompensated.results, strict=True))
    gapped = [plan for plan in plans if set("SAM") & set(plan.lstrip("S"))]
    closer = [r.plan for r in fast.results if r.plan in gapped and sum(r.kl) < sum(by_plan[r.plan].kl)]
    if "A" not in letters:  # what parts of random weights add is hardly linear in the rest
        assert len(closer) > len(gapped) / 2 > 1
    for plan in set(plans) - set(gapped):
        assert next(r for r in fast.results if r.plan == plan).scores == by_plan[plan].scores


def test_prompts_that_need_no_padding_are_fitted_on_too(evaluators: EvaluationDispatch) -> None:
    """Of prompts of one length, attention is given no mask; frozen and bypassed layers then make their own."""
    recipe = LINEAR.replace("200", "20")
    batches = evaluators.plain.compensator.calibration(Recipe.parse(recipe)).batches
    assert all(batch.kwargs["attention_mask"].all() for batch in batches)
    plans = ("RFBSRR", "BRSFSR")
    asked = {"plans": plans, "split": "search", "n_samples": 20, "compensation": recipe}
    fast, plain = (evaluators.evaluate(EvaluatePlans(**asked, path=path)) for path in ("fast", "plain"))
    for one, other in zip(fast.results, plain.results, strict=True):
        assert isinstance(one, Evaluation) and isinstance(other, Evaluation)
        assert one.path == "fast" and one.scores == other.scores


@pytest.mark.parametrize(
    ("recipe", "places"),
    [
        (LINEAR, [(0, 1), (2, 4)]),
        (f"{LINEAR} drift=yes", [(0, 1), (2, 4), (5, 5)]),
        (f"{LINEAR} drift=yes scope=projection", [(0, 1), (2, 4), (5, 5)]),
    ],
)
def test_kept_maps_are_read_back_and_folded(
    evaluators: EvaluationDispatch, tiny: LoadedModel, tmp_path: Path, recipe: str, places: list[tuple[int, int]]
) -> None:
    compensator = evaluators.plain.compensator
    kept = compensator.fit(FitCompensation("RSRSSR", recipe))
    artifact = store.put(str(tmp_path), kept.content)
    decoded = decode(store.get(artifact), plan="RSRSSR")
    fitted = compensator.fitted(SkipPlan.parse("RSRSSR"), Recipe.parse(recipe))
    assert decoded.compensation == recipe and decoded.maps.keys() == fitted.maps.keys() == dict(places).keys()
    assert all(torch.equal(decoded.maps[layer].matrix, own.matrix) for layer, own in fitted.maps.items())
    assert [(gap.layer, gap.end) for gap in kept.gaps] == places
    assert all(0 <= gap.unexplained < gap.plain_share for gap in kept.gaps)
    asked = {"plans": ("RSRSSR", "RRRRRR"), "split": "held_out", "compensation": recipe, "artifacts": (artifact, None)}
    before = {name: value.clone() for name, value in tiny.model.state_dict().items()}
    fast, plain = (evaluators.evaluate(EvaluatePlans(**asked, path=path)) for path in ("fast", "plain"))
    for one, other in zip(fast.results, plain.results, strict=True):
        assert isinstance(one, Evaluation) and isinstance(other, Evaluation)
        assert one.scores == other.scores and one.path == "fast"
    assert all(torch.equal(before[name], value) for name, value in tiny.model.state_dict().items())
    with apply(tiny.model, SkipPlan.parse("RSRSSR"), decoded.maps):
        pass  # the maps are those of its gaps


def test_equal_fits_make_equal_files(evaluators: EvaluationDispatch, tiny: LoadedModel, small_task: Task) -> None:
    request = FitCompensation("RSRSSR", LINEAR)
    again = PlainEvaluator(tiny, small_task, batch_size=2).compensator
    assert evaluators.plain.compensator.fit(request).content == again.fit(request).content


def test_a_plan_that_cannot_be_compensated_fails_alone(
    evaluators: EvaluationDispatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = LINEAR.replace("0.001", "0.01")
    calibration = evaluators.plain.compensator.calibration(Recipe.parse(text))
    monkeypatch.setitem(calibration.holders["mlp"].refusals, 1, "layer 1 cannot hold a map")
    for path in ("fast", "plain"):
        found = evaluators.evaluate(EvaluatePlans(("RRSSRS", "RRRRRR"), "search", compensation=text, path=path))
        refused, dense = found.results
        assert isinstance(refused, EvaluationFailure) and "layer 1 cannot hold a map" in refused.reason
        assert isinstance(dense, Evaluation)


def test_maps_of_another_plan_or_damaged_ones_are_refused(evaluators: EvaluationDispatch, tmp_path: Path) -> None:
    compensator = evaluators.plain.compensator
    kept = compensator.fit(FitCompensation("RSRSSR", LINEAR))
    artifact = store.put(str(tmp_path), kept.content)
    with pytest.raises(CompensationError, match="those of plan RSRSSR, not of RSRRRR"):
        decode(store.get(artifact), plan="RSRRRR")
    Path(artifact.location).write_bytes(kept.content[:-4] + b"\0\0\0\0")
    with pytest.raises(CompensationError, match="not what was fitted"):
        store.get(artifact)
    assert store.put(str(tmp_path), kept.content) == artifact and store.get(artifact) == kept.content
    Path(artifact.location).unlink()
    with pytest.raises(CompensationError, match="cannot be read"):
        store.get(artifact)
    for content in (b"", b"\0" * 100, kept.content[:50]):
        with pytest.raises(CompensationError, match="cannot be read"):
            decode(content)


def test_a_store_may_be_a_url(evaluators: EvaluationDispatch) -> None:
    kept = evaluators.plain.compensator.fit(FitCompensation("RSRRRR", LINEAR))
    artifact = store.put("memory://maps/here", kept.content)
    assert artifact.location.startswith("memory://maps/here/") and store.get(artifact) == kept.content
    with pytest.raises(CompensationError, match="cannot be written"):
        store.put("nowhere://maps", kept.content)


def test_no_maps_are_fitted_where_none_are_asked_for(evaluators: EvaluationDispatch) -> None:
    compensator = evaluators.plain.compensator
    assert compensator.maps(SkipPlan.parse("RSRRRR"), "none") is None
    with pytest.raises(CompensationError, match="no maps to fit"):
        compensator.fit(FitCompensation("RSRRRR", "none"))
