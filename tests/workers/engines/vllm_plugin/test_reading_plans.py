from __future__ import annotations

import pytest

from workers.engines.vllm_plugin.plan import LETTERS, PlanRefusedError, Serving, Treatment, read_plan, refuse_serving
from workers.runtime import Action

RUN, FREEZE, BYPASS = Treatment.RUN, Treatment.FREEZE, Treatment.BYPASS
NO_ATTENTION, NO_MLP, NOTHING = Treatment.SKIP_ATTENTION, Treatment.SKIP_MLP, Treatment.SKIP
TEXT = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}


def blocks(*skipped: str) -> list[dict[str, object]]:
    """NVIDIA's list, as its tools write it: sizes stand at the parts that run."""
    return [
        {
            "attention": {"no_op": "a" in parts, "n_heads_in_group": None if "a" in parts else 2},
            "ffn": {"no_op": "m" in parts, "intermediate_size": None if "m" in parts else 96},
        }
        for parts in skipped
    ]


def test_letters_mean_what_the_runtime_means_by_them():
    assert {letter: treatment.value for letter, treatment in LETTERS.items()} == {
        action.letter: action.label for action in Action
    }


@pytest.mark.parametrize(
    ("config", "plan"),
    [
        ({"skip_plan": "RFBS", "text_config": TEXT}, (RUN, FREEZE, BYPASS, NOTHING)),
        ({"skip_plan": "RFRR"} | TEXT, (RUN, FREEZE, RUN, RUN)),
        ({"text_config": TEXT | {"per_layer_config": {"2": {"skip": ["mlp"]}}}}, (RUN, RUN, NO_MLP, RUN)),
        (
            {
                "text_config": TEXT
                | {"per_layer_config": {0: {"skip": ["attention"]}, 3: {"skip": ["attention", "mlp"]}}}
            },
            (NO_ATTENTION, RUN, RUN, NOTHING),
        ),
        ({"text_config": TEXT, "block_configs": blocks("", "a", "m", "am")}, (RUN, NO_ATTENTION, NO_MLP, NOTHING)),
        (
            {
                "text_config": TEXT | {"per_layer_config": {"1": {"skip": ["attention"]}}},
                "block_configs": blocks("", "a", "", ""),
            },
            (RUN, NO_ATTENTION, RUN, RUN),
        ),
    ],
)
def test_each_vocabulary_is_read(config: dict[str, object], plan: tuple[Treatment, ...]):
    assert read_plan(config) == plan


@pytest.mark.parametrize(
    "config",
    [
        {"text_config": TEXT},
        {"skip_plan": "RRRR", "text_config": TEXT},
        {"text_config": TEXT | {"per_layer_config": {"1": {"intermediate_size": 96}}}},
        {"text_config": TEXT, "block_configs": blocks("", "", "", "")},
    ],
)
def test_a_model_that_runs_every_layer_has_no_plan(config: dict[str, object]):
    assert read_plan(config) is None


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"skip_plan": "RFS"}, "skip_plan of config.json is for 3 layers and the model has 4: it is another model's"),
        ({"skip_plan": "RXRR"}, "layer 1: 'X' is none of R, F, B, S"),
        ({"skip_plan": ["R"] * 4}, "not a text of one letter per layer"),
        ({"per_layer_config": {"4": {"skip": ["mlp"]}}}, "no layer 4 in a model of 4 layers"),
        ({"per_layer_config": {"-1": {"skip": ["mlp"]}}}, "no layer -1 in a model of 4 layers"),
        ({"per_layer_config": {"1": {"skip": "mlp"}}}, 'skip is \'mlp\', not a list of "attention" and "mlp"'),
        ({"per_layer_config": {"1": {"skip": ["norm"]}}}, 'not a list of "attention" and "mlp"'),
        ({"per_layer_config": {"1": {"intermediate_size": 48}}}, "layer 1: intermediate_size = 48 is not the model's"),
        ({"block_configs": blocks("", "a", "m")}, "not a list of 4 entries"),
        (
            {"block_configs": [{"attention": {"replace_with_linear": True}}, *blocks("", "", "")]},
            "layer 0: attention: replace_with_linear = True is not the model's",
        ),
        (
            {"skip_plan": "RRRS", "block_configs": blocks("", "", "", "m")},
            "skip_plan and block_configs of config.json name different plans",
        ),
        ({"per_layer_config": {str(n): {"skip": ["attention"]} for n in range(4)}}, "no layer with attention"),
    ],
)
def test_a_plan_that_cannot_be_served_is_refused_in_one_line(config: dict[str, object], reason: str):
    with pytest.raises(PlanRefusedError) as refused:
        read_plan({"text_config": TEXT} | config)
    assert str(refused.value).startswith("skipplan: ") and reason in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("treatment", "serving", "reason"),
    [
        (FREEZE, Serving(compiled=True), "layer 1 is frozen: .* add --enforce-eager"),
        (BYPASS, Serving(compiled=True), "layer 1 is bypassed: .* add --enforce-eager"),
        (BYPASS, Serving(prefix_caching=True), "layer 1 is bypassed: .* add --no-enable-prefix-caching"),
        (BYPASS, Serving(cpu_attention=False), "layer 1 is bypassed, .* attention for CPUs only"),
        (FREEZE, Serving(options=("--speculative-config",)), "not served with --speculative-config"),
        (NO_MLP, Serving(options=("--enable-lora",)), "not served with --enable-lora"),
    ],
)
def test_options_that_do_not_go_with_a_plan_are_refused(treatment: Treatment, serving: Serving, reason: str):
    with pytest.raises(PlanRefusedError, match=reason):
        refuse_serving((RUN, treatment), serving)


@pytest.mark.parametrize(
    ("treatment", "serving"),
    [
        (FREEZE, Serving(prefix_caching=True, cpu_attention=False)),
        (BYPASS, Serving()),
        (NO_ATTENTION, Serving(compiled=True, prefix_caching=True, cpu_attention=False)),
        (NO_MLP, Serving(options=("--speculative-config",))),
    ],
)
def test_options_that_go_with_a_plan_are_not(treatment: Treatment, serving: Serving):
    refuse_serving((RUN, treatment), serving)
