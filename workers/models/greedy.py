"""Decode answers greedily, as every answer is that a score or a fitted map comes from."""

from __future__ import annotations

from torch import Tensor
from transformers import LogitsProcessorList

from workers.models.inputs import PreparedBatch
from workers.models.loading import LoadedModel
from workers.models.prompts import to_device
from workers.models.ties import AnswerWatch, end_tokens


def decode_greedily(
    loaded: LoadedModel, batch: PreparedBatch, max_new_tokens: int
) -> tuple[Tensor, Tensor, AnswerWatch]:
    """Generate for the batch under whatever plan is applied to the model.

    Returns the prompts ``[batch, tokens]``, what ``generate`` returned (of most families the prompts with the new
    tokens behind them), and the watch that saw the logits.
    """
    assert batch.inputs is not None
    inputs = to_device(batch.inputs, loaded.device, loaded.model.dtype)
    prompt = inputs["input_ids"]
    watch = AnswerWatch(prompt.shape[0], prompt.shape[1], end_tokens(loaded.model), loaded.model.dtype)
    sequences = loaded.model.generate(
        **inputs,
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        pad_token_id=loaded.processor.tokenizer.pad_token_id,
        logits_processor=LogitsProcessorList([watch]),
        return_dict_in_generate=False,  # whatever the model's generation settings say
    )
    return prompt, sequences, watch
