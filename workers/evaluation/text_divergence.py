"""Measure a plan's divergence from the dense model on general text.

A compensation is fitted to one task's samples; this says what it did to the rest of the model.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from workers.errors import MeasurementError
from workers.messages import TextDivergence
from workers.models.loading import LoadedModel
from workers.runtime import apply
from workers.runtime.folding import Maps
from workers.runtime.plan import SkipPlan

WINDOW = 512
"""Tokens of text that are read together; each window starts anew."""
MOST_TOKENS = 8192


def text_divergence(loaded: LoadedModel, plan: SkipPlan, maps: Maps | None, text: str) -> TextDivergence:
    """Mean KL(dense || plan) per token in nats, and both perplexities, on the beginning of ``text``.

    Raises:
        MeasurementError: the text has fewer than two tokens, or logits hold NaN on it.
        PlanError: the model cannot take the plan.
    """
    ids = loaded.processor.tokenizer(text, add_special_tokens=False)["input_ids"][:MOST_TOKENS]
    windows = [ids[start : start + WINDOW] for start in range(0, len(ids), WINDOW)]
    windows = [window for window in windows if len(window) > 1]
    if not windows:
        raise MeasurementError("the text has fewer than two tokens, so nothing can be compared on it")
    divergence = dense_loss = plan_loss = 0.0
    predicted = 0
    with torch.inference_mode():
        for window in windows:
            tokens = torch.tensor([window], device=loaded.device)
            dense = _log_probabilities(loaded, tokens)
            with apply(loaded.model, plan, maps):
                own = _log_probabilities(loaded, tokens)
            divergence += float((dense.exp() * (dense - own)).sum(-1).clamp(min=0).sum())
            dense_loss -= float(dense.gather(1, tokens[0, 1:, None]).sum())
            plan_loss -= float(own.gather(1, tokens[0, 1:, None]).sum())
            predicted += len(window) - 1
    if not math.isfinite(divergence + dense_loss + plan_loss):
        raise MeasurementError("logits hold NaN on the text, so nothing can be compared on it")
    return TextDivergence(
        plan=plan.text,
        tokens=predicted,
        kl=divergence / predicted,
        dense_loss=dense_loss / predicted,
        plan_loss=plan_loss / predicted,
    )


def _log_probabilities(loaded: LoadedModel, tokens: Tensor) -> Tensor:
    """Log-probabilities ``[tokens - 1, vocabulary]`` of every next token, float32."""
    output = loaded.model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    logits: Tensor = output.logits[0, :-1].float()
    return logits.log_softmax(-1)
