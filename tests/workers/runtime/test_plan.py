import pickle
import re
import subprocess
import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from workers.runtime import Action, PlanError, SkipPlan

LETTERS = "RFBSAMQP"
texts = st.text(alphabet=LETTERS, min_size=1, max_size=80)


@given(texts)
def test_text_round_trip(text: str) -> None:
    plan = SkipPlan.parse(text)
    assert str(plan) == plan.text == text
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert len(plan) == len(text) and [action.letter for action in plan] == list(text)


@given(texts, texts)
def test_plans_are_equal_hashed_and_ordered_as_their_texts(first: str, second: str) -> None:
    one, other = SkipPlan.parse(first), SkipPlan.parse(second)
    assert (one == other) == (first == second)
    assert (one < other) == (first < second) and (one >= other) == (first >= second)
    assert len({one, other, SkipPlan.parse(first)}) == len({first, second})


@given(texts)
def test_layers_of_all_actions_partition_the_plan(text: str) -> None:
    plan = SkipPlan.parse(text)
    layers = sorted(layer for action in Action for layer in plan.layers(action))
    assert layers == list(range(len(text)))
    assert all(text[layer] == action.letter for action in Action for layer in plan.layers(action))
    assert plan.kept == tuple(layer for layer, letter in enumerate(text) if letter != "S")
    assert plan.is_dense == (set(text) == {"R"})
    assert plan.needs_vision_tokens == bool(set("FBQP") & set(text))
    assert plan.partial == tuple(layer for layer, letter in enumerate(text) if letter in "AM")
    assert [action.row.keeps_keys for action in plan] == [letter in "RFBMQP" for letter in text]
    assert [action.row.splits_attention for action in plan] == [letter in "FBQ" for letter in text]


@given(texts)
@example("RMASMSSARMMASAAMRA")
def test_a_gap_from_behind_attention_to_before_an_mlp_joins_two_layers(text: str) -> None:
    plan = SkipPlan.parse(text)
    assert plan.joins == tuple((found.start(), found.end() - 1) for found in re.finditer("MS*A", text))
    without = re.sub("MS*A", lambda found: "R" * len(found[0]), text)
    assert plan.needs_code == tuple(layer for layer, letter in enumerate(without) if letter not in "RS")


@given(texts.flatmap(lambda text: st.tuples(st.just(text), st.integers(0, len(text) - 1), st.sampled_from(Action))))
def test_changing_one_layer_changes_that_layer_only(case: tuple[str, int, Action]) -> None:
    text, layer, action = case
    plan = SkipPlan.parse(text)
    changed = plan.with_action(layer, action)
    assert changed.text == text[:layer] + action.letter + text[layer + 1 :]
    assert plan.text == text


@given(st.text(min_size=1, max_size=40))
def test_a_wrong_letter_is_named_with_its_layer(text: str) -> None:
    wrong = next((layer for layer, letter in enumerate(text) if letter not in LETTERS), None)
    if wrong is None:
        assert SkipPlan.parse(text).text == text
    else:
        with pytest.raises(PlanError, match=f"^layer {wrong}: "):
            SkipPlan.parse(text)


def test_the_known_special_cases() -> None:
    assert SkipPlan.dense(4).text == "RRRR"
    assert SkipPlan.skipping(4, [3, 1]).text == "RSRS"


@pytest.mark.parametrize(
    "build",
    [
        lambda: SkipPlan.skipping(4, [4]),
        lambda: SkipPlan.skipping(4, [-1]),
        lambda: SkipPlan.dense(0),
        lambda: SkipPlan.parse(""),
        lambda: SkipPlan(("R",)),
        lambda: SkipPlan.dense(3).with_action(3, Action.SKIP),
    ],
)
def test_impossible_plans_are_refused(build) -> None:
    with pytest.raises(PlanError):
        build()


def test_a_plan_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        SkipPlan.parse("RS").actions = ()  # type: ignore[misc]


def test_the_plan_value_needs_no_torch() -> None:
    code = "import sys; from workers.runtime import SkipPlan; SkipPlan.parse('RS'); print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
