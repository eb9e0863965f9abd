"""What scoring costs, counted at the layers themselves and not by the code that reports it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
from torch import Tensor, nn

from optimizer import criteria
from workers.models.inputs import prepare_batch
from workers.models.loading import LoadedModel
from workers.redundancy.measure import measure_redundancy
from workers.redundancy.sums import merge
from workers.tasks import Task

LAYERS = 6
WITHOUT_CAUSAL = ("distance", "cka", "angular", "probes", "attention", "propagation")


@pytest.fixture(autouse=True)
def checked(tiny: LoadedModel, few: Task) -> None:
    """Whether prefixes can be shared is found out once per model that a worker holds, which is no cost per sample."""
    measure_redundancy(tiny, replace(few, calibration=few.calibration[:1]), ("propagation",))


@contextmanager
def counted(loaded: LoadedModel, task: Task) -> Iterator[dict[str, float]]:
    """Samples times layers whose MLP ran (once in a frozen layer too), and samples times calls of the vision tower.

    A layer that runs over the tokens of a prompt counts 1, over more or fewer of them by their number.
    """
    counts = {"layers": 0.0, "tower": 0.0}
    prompt = prepare_batch(loaded, task, task.calibration).inputs["input_ids"].shape[1]
    width = prompt

    def note_width(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, Tensor]) -> None:
        nonlocal width
        width = kwargs["inputs_embeds"].shape[1]

    def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        counts["layers"] += len(args[0]) * width / prompt

    language = loaded.model.model.language_model
    handles = [language.register_forward_pre_hook(note_width, with_kwargs=True)]
    handles += [layer.mlp.register_forward_pre_hook(add) for layer in language.layers]
    tower = loaded.model.model.vision_tower

    def see(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, Tensor]) -> None:
        counts["tower"] += len(kwargs.get("pixel_values", args[0] if args else ()))

    inner = next(module for name, module in tower.named_modules() if name.endswith("embeddings"))
    handles.append(inner.register_forward_pre_hook(see, with_kwargs=True))
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def test_all_but_the_causal_part_takes_at_most_layers_plus_three_passes(tiny: LoadedModel, few: Task) -> None:
    with counted(tiny, few) as counts:
        scores = measure_redundancy(tiny, few, WITHOUT_CAUSAL)
    passes = counts["layers"] / (scores.samples * LAYERS)
    assert passes <= LAYERS + 3
    assert sum(scores.layer_executions.values()) == pytest.approx(counts["layers"])
    # Prefixes are shared: L passes of removals cost (L - 1) / 2, beside the dense one, and its answers with attention.
    assert passes <= (2 + (LAYERS - 1) / 2) * scores.forward_passes["states"] + 1e-9
    assert scores.forward_passes["states"] < 1.1  # the answers' tokens are few beside the prompts'


def test_trials_cost_at_most_half_as_much_again_as_removals(tiny: LoadedModel, few: Task) -> None:
    alike = replace(few, calibration=tuple(replace(few.calibration[0], id=str(number)) for number in range(4)))
    found = {}
    for name in ("skip-it", "calibrated"):
        needs = criteria.load(name).needs
        with counted(tiny, alike) as counts:
            scores = merge([measure_redundancy(tiny, alike, needs, shard=shard, shards=2) for shard in range(2)])
        assert scores.samples == 4
        assert sum(scores.layer_executions.values()) == pytest.approx(counts["layers"])
        found[name] = counts["layers"]
    assert found["calibrated"] <= 1.5 * found["skip-it"]


def test_the_causal_part_takes_at_most_three_fifths_of_whole_passes(tiny: LoadedModel, few: Task) -> None:
    with counted(tiny, few) as counts:
        scores = measure_redundancy(tiny, few, ("causal",))
    passes = scores.forward_passes["states"] * scores.samples
    answers = passes * LAYERS
    # Naive, beside the answers: dense, and every action at every layer from the start; a skipped layer is not run.
    naive = passes * (LAYERS + LAYERS * (LAYERS + LAYERS + LAYERS - 1))
    assert counts["layers"] - answers <= 0.6 * naive
    assert sum(scores.layer_executions.values()) == pytest.approx(counts["layers"])
    assert counts["tower"] == 2 * scores.samples  # the picture is looked at for the answers, and for everything else


def test_parts_are_measured_in_the_dense_pass_and_left_out_from_their_layer_on(tiny: LoadedModel, few: Task) -> None:
    with counted(tiny, few) as counts:
        scores = measure_redundancy(tiny, few, ("operators",))
    assert counts["layers"] == scores.samples * LAYERS
    with counted(tiny, few) as counts:
        scores = measure_redundancy(tiny, few, ("operator_causal",))
    # A replay from every layer on for every part. An MLP that is left out is called all the same, once for every layer;
    # the parts that the first two replays have of a layer make one. Where vision tokens alone go without attention, the
    # MLP is called for text and for them.
    called_twice = left_out = scores.layer_executions["states"]
    assert sum(scores.layer_executions.values()) == pytest.approx(counts["layers"] - left_out - called_twice)


def test_states_and_attention_take_a_pass_each(tiny: LoadedModel, few: Task) -> None:
    with counted(tiny, few) as counts:
        scores = measure_redundancy(tiny, few, ("distance", "cka", "angular", "probes", "attention"))
    assert counts["layers"] == 2 * scores.samples * LAYERS
    assert scores.forward_passes == {"states": 1.0, "attention": 1.0}  # what needs no answers asks for none
