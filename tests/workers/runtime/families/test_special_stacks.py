"""Models beside the common checks: tied stacks, names that do not come back, biases of positions, odd kinds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForImageTextToText,
    BlipConfig,
    BlipForConditionalGeneration,
    LlavaConfig,
    PreTrainedModel,
)
from transformers.models.diffusion_gemma.modeling_diffusion_gemma import DiffusionGemmaForBlockDiffusion

from workers.runtime import Action, PlanError, SkipPlan, UnsupportedFamilyError, apply, describe, save_pruned

from .catalogue import by_name, prompts_of
from .comparing import assert_close, plain_logits
from .held_out_exotic import gemma4_unified
from .picture_towers import TEXT, text, tower
from .references import reference_logits
from .test_surgery import reload
from .tiny import IMAGE, VOCABULARY, Family, build, since, sliced
from .uneven_stacks import GEMMA4_TYPES, gemma4_config

WITHOUT_GROUPS = {key: value for key, value in TEXT.items() if key not in ("head_dim", "num_key_value_heads")}
GEMMA_VISION = {
    "model_type": "gemma4_vision",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "patch_size": 4,
    "pooling_kernel_size": 2,
    "position_embedding_size": 16,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}


def from_config(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForImageTextToText.from_config(config).eval()
    return model


def llava_over(model_type: str, **changes: Any) -> PreTrainedModel:
    return from_config(
        LlavaConfig(
            vision_config=tower("clip_vision_model"),
            text_config={"model_type": model_type, **WITHOUT_GROUPS, **changes},
            image_token_index=IMAGE,
            image_seq_length=4,
        )
    )


# Weights in more than one place ---------------------------------------------------------------------------------------


def test_a_stack_whose_weights_are_those_of_another_is_refused() -> None:
    """DiffusionGemma: the encoder's layers would leave, the decoder's, tied to them, would stay."""
    text_config = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "global_head_dim": 16,
        "vocab_size": VOCABULARY,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 16,
    }
    config = CONFIG_MAPPING["diffusion_gemma"](
        text_config=text_config, vision_config=GEMMA_VISION, image_token_id=IMAGE
    )
    with pytest.raises(UnsupportedFamilyError, match=r"encoder.*are those of model\.decoder\.layers\.0"):
        describe(DiffusionGemmaForBlockDiffusion(config))


@pytest.mark.parametrize("what", ["layers", "weights"])
def test_layers_that_another_module_holds_too_are_refused(what: str) -> None:
    model = build(by_name("llava"))
    layers = model.get_submodule("model.language_model.layers")
    assert isinstance(layers, nn.ModuleList)
    describe(model)
    other = nn.Module()
    if what == "layers":
        other.again = nn.ModuleList([layers[2]])
    else:
        other.head = nn.Linear(1, 1)
        other.head.weight = layers[2].self_attn.o_proj.weight
    model.add_module("other", other)
    with pytest.raises(UnsupportedFamilyError, match=r"are those of other\."):
        apply(model, SkipPlan.parse("RRRSRRR"))


def test_one_list_under_two_names_is_one_list() -> None:
    model = build(by_name("llava"))
    model.add_module("alias", model.get_submodule("model.language_model"))
    assert describe(model).num_layers == 7


# Saved and read back --------------------------------------------------------------------------------------------------


def test_a_family_that_does_not_read_its_own_names_is_not_saved(tmp_path: Path) -> None:
    """ShieldGemma 2, as the class of image-text models loads it: all weights of a saved model would be random."""
    config = CONFIG_MAPPING["shieldgemma2"](
        text_config=text("gemma3_text", num_hidden_layers=4, sliding_window=6),
        vision_config=tower("siglip_vision_model"),
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=91,
        eoi_token_index=92,
    )
    model = from_config(config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(PlanError, match=r"shieldgemma2 model: \d+ missing keys, such as model\."):
        save_pruned(model, SkipPlan.parse("RSRR"), tmp_path / "cut")
    assert not list(tmp_path.iterdir())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert len(before) == len(model.state_dict())


WITHOUT_SHARING = (
    replace(
        by_name("gemma4"),
        config=lambda: gemma4_config(num_kv_shared_layers=0),
        saved_lists=lambda kept: {**sliced(layer_types=GEMMA4_TYPES)(kept), "num_kv_shared_layers": 0},
    ),
    replace(by_name("gemma4_unified"), config=lambda: gemma4_unified(num_kv_shared_layers=0)),
)


@pytest.mark.skipif(not since("5.23"), reason="before, its configuration does not say which layers share keys")
@pytest.mark.parametrize("family", WITHOUT_SHARING, ids=str)
def test_gemma_4_that_shares_no_keys_is_cut(family: Family, tmp_path: Path) -> None:
    """The default of its configuration; one that stores keys for others then stores them for nobody."""
    model, reference = build(family), build(family, "eager")
    for number, plan in enumerate(("SRRRSRRR", "RRSSRSRR", "RSRSRRSR")):
        save_pruned(model, SkipPlan.parse(plan), tmp_path / str(number))
        pruned = reload(family, tmp_path / str(number))
        for prompt in prompts_of(family)[:2]:
            expected = reference_logits(reference, family, plan, prompt)
            assert_close(family, plain_logits(pruned, family, prompt), expected, plan)


def blip() -> BlipForConditionalGeneration:
    text_config = {
        "hidden_size": 32,
        "encoder_hidden_size": 16,
        "intermediate_size": 48,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "vocab_size": VOCABULARY,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "sep_token_id": 2,
        "pad_token_id": 0,
        "max_position_embeddings": 64,
    }
    torch.manual_seed(0)
    return BlipForConditionalGeneration(BlipConfig(text_config=text_config, vision_config=tower("blip_vision_model")))


def test_blip_is_cut(tmp_path: Path) -> None:
    """Its layers note their number under a name of their own."""
    model = blip().eval()
    inputs = {"input_ids": torch.arange(20, 29)[None], "pixel_values": torch.randn(1, 3, 8, 8)}
    layers = model.text_decoder.bert.encoder.layer

    def passed(layer: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        return (arguments[0], *output[1:]) if isinstance(output, tuple) else arguments[0]

    handles = [layers[layer].register_forward_hook(passed) for layer in (1, 3)]
    with torch.no_grad():
        expected = model(**inputs).logits
        for handle in handles:
            handle.remove()
        assert not torch.equal(model(**inputs).logits, expected)
        cut = BlipForConditionalGeneration.from_pretrained(
            save_pruned(model, SkipPlan.parse("RSRSR"), tmp_path / "cut")
        ).eval()
        torch.testing.assert_close(cut(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
    assert len(cut.text_decoder.bert.encoder.layer) == 3


# What a call could not do ---------------------------------------------------------------------------------------------


BIASED = {
    "bloom": {},
    "mpt": {"expansion_ratio": 2, "max_seq_len": 64},
    "falcon": {"alibi": True},
}


@pytest.mark.parametrize("model_type", BIASED)
def test_layers_with_a_bias_for_each_position_are_not_offered_split(model_type: str, tmp_path: Path) -> None:
    model = llava_over(model_type, **BIASED[model_type])
    for layer in range(7):
        assert describe(model).allowed[layer] == {Action.RUN, Action.SKIP}
        assert "position" in describe(model).reason(layer, Action.FREEZE)
    with pytest.raises(PlanError, match=r"layer 2 cannot take B .*(alibi|position_bias)"):
        apply(model, SkipPlan.parse("RRBRRRR"))
    save_pruned(model, SkipPlan.parse("RSRRSRR"), tmp_path / "cut")


def test_falcon_with_rotary_positions_is_offered_every_action_and_computes_it() -> None:
    family = replace(by_name("llava"), name="falcon", config=lambda: llava_over("falcon", alibi=False).config)
    family = replace(family, stack="model.language_model.h")
    model, reference = build(family), build(family, "eager")
    for plan in ("FRBRRSR", "RBRFSRR"):
        for prompt in prompts_of(family):
            expected = reference_logits(reference, family, plan, prompt)
            with apply(model, SkipPlan.parse(plan)):
                assert_close(family, plain_logits(model, family, prompt), expected, plan)


def reasons(model: PreTrainedModel) -> list[str]:
    return [refused.get(Action.FREEZE, "") for refused in describe(model).refusals]


def test_reasons_say_what_is_so() -> None:
    """A layer without attention mixes no tokens, and attention over a cache of its own is attention."""
    hybrid = llava_over(
        "nemotron_h",
        layers_block_type=["linear_attention", "moe", "full_attention", "mlp"],
        num_key_value_heads=2,
        head_dim=8,
        n_routed_experts=4,
        moe_shared_expert_intermediate_size=16,
        n_groups=1,
        mamba_num_heads=4,
        mamba_head_dim=8,
        ssm_state_size=8,
        **EXPERTS,
    )
    found = reasons(hybrid)
    assert [bool(reason) for reason in found] == [True, True, False, True]
    assert all("mixes tokens" not in reason and "KV cache" in reason for reason in found if reason)
    assert "moe" in found[1] and "mlp" in found[3]
    if not since("5.20"):
        return  # the other model is not in transformers
    windowed = CONFIG_MAPPING["unlimited_ocr"](
        text_config={
            "model_type": "unlimited_ocr_text",
            **WITHOUT_GROUPS,
            "num_hidden_layers": 3,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            **EXPERTS,
        }
    )
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(windowed)
    assert all("reference_sliding_attention" in reason and "plain KV cache" in reason for reason in reasons(model))
