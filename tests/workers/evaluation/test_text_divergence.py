"""What a plan does beside its task, against direct computation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from workers.errors import MeasurementError
from workers.evaluation.text_divergence import WINDOW, text_divergence
from workers.messages import ModelSource
from workers.models.loading import LoadedModel, load_model
from workers.runtime import SkipPlan, apply

TEXT = "is there a red circle in the image? what shape is green? " * 40


def test_divergence_on_text_is_that_of_plain_forward_passes(tiny: LoadedModel) -> None:
    plan = SkipPlan.parse("RSRRSR")
    found = text_divergence(tiny, plan, None, TEXT)
    ids = tiny.processor.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    kl, losses, count = 0.0, {"dense": 0.0, "plan": 0.0}, 0
    for start in range(0, len(ids), WINDOW):
        window = torch.tensor([ids[start : start + WINDOW]])
        logs = {}
        with torch.no_grad():
            logs["dense"] = tiny.model(input_ids=window).logits[0].log_softmax(-1)
            with apply(tiny.model, plan):
                logs["plan"] = tiny.model(input_ids=window).logits[0].log_softmax(-1)
        for place in range(window.shape[1] - 1):
            dense, own = logs["dense"][place], logs["plan"][place]
            kl += float((dense.exp() * (dense - own)).sum())
            for name in losses:
                losses[name] -= float(logs[name][place, window[0, place + 1]])
            count += 1
    assert len(ids) > WINDOW and found.tokens == count
    assert found.kl == pytest.approx(kl / count, rel=1e-3) and found.kl > 0
    assert found.dense_loss == pytest.approx(losses["dense"] / count, rel=1e-4)
    assert found.plan_loss == pytest.approx(losses["plan"] / count, rel=1e-4)


def test_the_dense_plan_does_not_diverge(tiny: LoadedModel) -> None:
    found = text_divergence(tiny, SkipPlan.dense(6), None, TEXT)
    assert found.kl == 0.0 and found.dense_loss == found.plan_loss


def test_a_text_without_tokens_is_refused(tiny: LoadedModel) -> None:
    with pytest.raises(MeasurementError, match="fewer than two tokens"):
        text_divergence(tiny, SkipPlan.dense(6), None, "")


def test_a_text_on_which_logits_hold_nan_is_no_number(tiny_directory: Path) -> None:
    poisoned = load_model(ModelSource(str(tiny_directory), device="cpu"))
    word = poisoned.processor.tokenizer("triangle", add_special_tokens=False)["input_ids"][0]
    with torch.no_grad():
        poisoned.model.get_input_embeddings().weight[word] = float("nan")
    assert text_divergence(poisoned, SkipPlan.dense(6), None, TEXT).kl == 0.0
    with pytest.raises(MeasurementError, match="hold NaN"):
        text_divergence(poisoned, SkipPlan.parse("RSRRSR"), None, f"{TEXT} triangle blue")
