"""Packed passages of text against one forward call for each, on tiny models of several families."""

from __future__ import annotations

import pytest
import torch

from workers.evaluation.shared.fast_passages import passage_drafts
from workers.evaluation.shared.packing import Packer, make_rows
from workers.evaluation.shared.prompts import text_prompt
from workers.evaluation.shared.state_cache import StateCache
from workers.evaluation.shared.walk import Walker
from workers.layerwise.decoder import Decoder, NotExactError
from workers.layerwise.trie import build_trie
from workers.runtime import SkipPlan, apply
from workers.runtime.locate import locate

from .catalogue import by_name, mixed_plans
from .comparing import distance, supported
from .tiny import build, forget_positions

EXACT = ("llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3", "idefics3", "internvl", "mistral3")
DECLINED = {"gemma3n": "hand each other more", "qwen3_5": "cannot be given some rows"}
TEXTS = (tuple(range(10, 50)), (31, 12, 45, 12, 31), tuple(range(60, 20, -1)), (11, 12))


@pytest.mark.parametrize("name", EXACT)
def test_packed_passages_give_the_logits_of_each_alone_at_every_position(name: str) -> None:
    family = by_name(name)
    supported(family)
    model = build(family)
    decoder = Decoder(model)
    if "sliding_attention" in decoder.kinds:
        assert locate(model).text_config.sliding_window < len(TEXTS[0])
    plans = [SkipPlan.dense(family.layers), *map(SkipPlan.parse, mixed_plans(family, 4, seed=9))]
    with torch.inference_mode():
        texts = [text_prompt(decoder, tokens, index) for index, tokens in enumerate(TEXTS)]
        rows = make_rows(texts, lambda sample: passage_drafts(TEXTS[sample]))
        chunk = Packer(decoder, torch.device("cpu")).chunk(("one",), rows)
        found = {
            plan: decoder.logits(states)
            for node, states in Walker(decoder, StateCache(1 << 30)).ends(build_trie(plans), chunk)
            for plan in node.plans
        }
    for plan in plans:
        for branch, (first, last) in zip(chunk.samples, chunk.spans, strict=True):
            tokens = TEXTS[branch.sample]
            assert branch.draft.tokens == tokens[1:] and last - first == len(tokens) - 1
            forget_positions(model)
            ids = torch.tensor([tokens])
            with torch.inference_mode(), apply(model, plan):
                expected = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, :-1]
            difference = distance(found[plan.text][first:last], expected.float())
            assert difference <= 5 * family.tolerance, f"{name} {plan}: logits differ by {difference:.1e}"


@pytest.mark.parametrize("name", DECLINED)
def test_what_is_not_exact_is_declined(name: str) -> None:
    family = by_name(name)
    supported(family)
    model = build(family)
    with pytest.raises(NotExactError, match=DECLINED[name]), torch.inference_mode():
        text_prompt(Decoder(model), TEXTS[0], 0)
