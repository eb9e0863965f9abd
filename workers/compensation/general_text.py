"""General text for a mixture: a given one, or one that the model itself samples, as windows of tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from workers.models.loading import LoadedModel
from workers.runtime.locate import locate

from .calibration import text_refused
from .recipe import OWN_TEXT, CompensationError, Recipe, id_of_text

WINDOW = 256
"""Tokens of text that are read together; each window starts anew, with what the tokenizer begins every text with."""
SAMPLED_TOGETHER = 16
"""Windows that the model samples together. Fixed, since rounding depends on it."""


def windows(loaded: LoadedModel, recipe: Recipe, text: str | None) -> list[Tensor]:
    """Return the general text of a recipe, ``[tokens]`` each on the CPU, as many tokens as its share asks for.

    ``text`` is the one that the recipe names. Raises CompensationError when it is another one, or too short.
    """
    wanted = round(recipe.text_share * recipe.tokens)
    limit = getattr(locate(loaded.model).text_config, "max_position_embeddings", None) or WINDOW
    width = min(WINDOW, int(limit), max(2, wanted))
    if recipe.text_id == OWN_TEXT:
        return _sampled(loaded, -(-wanted // width), width, recipe.seed)
    if text is None or id_of_text(text) != recipe.text_id:
        raise CompensationError(f"the general text {recipe.text_id} of the maps' recipe is not the one at hand")
    ordinary, tokenizer = set(ordinary_tokens(loaded).tolist()), loaded.processor.tokenizer
    begin = tokenizer("")["input_ids"]
    ids = [each for each in tokenizer(text, add_special_tokens=False)["input_ids"] if each in ordinary]
    step = max(1, width - len(begin))
    starts = range(0, min(len(ids), -(-wanted // width) * step), step)
    found = [torch.tensor(begin + ids[start : start + step]) for start in starts]
    if sum(map(len, found)) < wanted:
        raise CompensationError(
            f"compensation.text has {len(ids)} tokens, fewer than the {wanted} that text_share {recipe.text_share:g} "
            f"of {recipe.tokens} tokens asks for; give a longer text, or a smaller share"
        )
    return [window for window in found if len(window) > max(1, len(begin))]


def _sampled(loaded: LoadedModel, count: int, width: int, seed: int) -> list[Tensor]:
    """Sample ``count`` texts of ``width`` tokens from the dense model, each behind one random token (Liu et al. 2023).

    arXiv 2305.17888; every further token is drawn from the model's own distribution, special tokens left out.
    """
    tokenizer, ordinary = loaded.processor.tokenizer, ordinary_tokens(loaded)
    begin = tokenizer("")["input_ids"]
    vocabulary = int(loaded.model.get_input_embeddings().weight.shape[0])
    special = torch.ones(vocabulary, dtype=torch.bool)
    special[ordinary] = False
    devices = [loaded.device] if loaded.device.type == "cuda" else []
    found: list[Tensor] = []
    with torch.random.fork_rng(devices=devices), torch.inference_mode():
        torch.manual_seed(seed)
        while len(found) < count:
            rows = min(SAMPLED_TOGETHER, count - len(found))
            first = ordinary[torch.randint(len(ordinary), (rows, 1))]
            prompts = torch.cat([torch.tensor(begin, dtype=torch.long).expand(rows, -1), first], 1).to(loaded.device)
            if prompts.shape[1] < width:
                try:
                    prompts = _continue(loaded.model, prompts, width, special.nonzero().flatten().tolist())
                except Exception as error:  # model code of any family raises all kinds here
                    raise CompensationError(text_refused(error)) from error
            found += list(prompts.cpu())
    return found


def _continue(model: Any, prompts: Tensor, width: int, special: list[int]) -> Tensor:
    new = width - prompts.shape[1]
    sequences: Tensor = model.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=True,
        num_beams=1,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_new_tokens=new,
        max_new_tokens=new,
        suppress_tokens=special,
        pad_token_id=0,
        use_cache=True,
        return_dict_in_generate=False,
    )
    return sequences if sequences.shape[1] == width else torch.cat([prompts, sequences], 1)


def ordinary_tokens(loaded: LoadedModel) -> Tensor:
    """Return the ids of the tokens that are text, none of which stands for an image or an end."""
    tokenizer = loaded.processor.tokenizer
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    size = min(len(tokenizer), int(loaded.model.get_input_embeddings().weight.shape[0]))
    return torch.tensor([each for each in range(size) if each not in special])
