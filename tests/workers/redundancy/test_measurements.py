"""Every measurement against an independent implementation in numpy, and against numbers worked out by hand."""

from __future__ import annotations

import re
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import plain
import pytest
import torch
from measurement_tables import columns
from transformers.utils import ModelOutput

from workers.errors import MeasurementError
from workers.messages import TOKEN_GROUPS, ModelSource
from workers.models.loading import LoadedModel, load_model
from workers.redundancy.answers import before_vision
from workers.redundancy.attention import VisionAttention
from workers.redundancy.batches import Batch, token_groups
from workers.redundancy.collectors import cosine_distance, unbiased_hsic
from workers.redundancy.interventions import answer_kl
from workers.redundancy.kinds import GROUPS, HISTOGRAM_EDGES, finish, histogram_quantile
from workers.redundancy.measure import measure_redundancy
from workers.redundancy.sums import merge
from workers.tasks import Task
from workers.tasks.images import ImageFile

LAYERS = 6


@pytest.fixture(scope="module")
def prompts(tiny: LoadedModel, few: Task) -> list[plain.Prompt]:
    return plain.prompts(tiny, few, plain.eager_copy(tiny))


# By hand ----------------------------------------------------------------------------------------------------------


def test_cosine_distance_by_hand() -> None:
    before = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [1.0, 1.0], [3.0, 4.0]]])
    after = torch.tensor([[[5.0, 0.0], [0.0, 2.0], [-2.0, -2.0], [4.0, 3.0]]])
    assert cosine_distance(before, after)[0].tolist() == pytest.approx([0.0, 1.0, 2.0, 1 - 24 / 25], abs=1e-6)
    assert cosine_distance(before.bfloat16(), after.bfloat16()).dtype == torch.float32


def test_padding_is_in_no_group_and_right_padding_is_refused() -> None:
    inputs = {
        "input_ids": torch.tensor([[0, 9, 9, 5], [9, 5, 6, 7]]),
        "attention_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]),
    }
    groups = token_groups(inputs, (9, 0))
    assert groups["vision"].tolist() == [[False, True, True, False], [True, False, False, False]]
    assert groups["text"].tolist() == [[False, False, False, True], [False, True, True, True]]
    assert groups["last"].tolist() == [[False, False, False, True]] * 2
    inputs["attention_mask"] = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    answered = token_groups(inputs, (9, 0), answer_tokens=2)
    assert answered["all"].tolist() == [[True, True, False, False]] * 2
    assert answered["last"].tolist() == [[False, True, False, False]] * 2
    assert answered["answer"].tolist() == [[False, True, True, False], [False, True, True, True]]
    with pytest.raises(MeasurementError, match="left"):
        token_groups(inputs, (9,))


def test_divergence_by_hand() -> None:
    dense = torch.tensor([[0.0, 0.0], [0.0, -torch.inf]])
    changed = torch.log(torch.tensor([[0.9, 0.1], [0.5, 0.5]]))
    expected = [0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1), np.log(2)]
    assert answer_kl(dense, changed).tolist() == pytest.approx(expected)
    assert answer_kl(changed, changed).tolist() == [0.0, 0.0]


def test_attention_on_vision_tokens_by_hand() -> None:
    vision = torch.tensor([[True, True, False, False], [False, False, False, False]])
    groups = {"vision": vision, "text": ~vision, "last": torch.tensor([[False, False, False, True]] * 2)}
    groups["all"] = torch.ones_like(vision)
    maps = torch.zeros(2, 2, 4, 4)
    maps[0, 0, 2] = torch.tensor([0.5, 0.25, 0.25, 0.0])
    maps[0, 1, 2] = torch.tensor([0.25, 0.0, 0.75, 0.0])
    maps[0, :, 3] = torch.tensor([0.0, 0.1, 0.0, 0.9])
    collector = VisionAttention(1)
    collector._add(0, (None, maps), Batch((None, None), {}, groups))  # type: ignore[arg-type]
    sums = collector.sums().added["attention"]
    # The second sample has no vision token: it counts for nothing. Its queries would halve the mean.
    assert sums[0, :, 0].tolist() == pytest.approx([(0.75 + 0.25) / 2 + 0.1, 0.1])
    assert sums[1, :, 0].tolist() == [2.0, 1.0]


def test_unbiased_hsic_is_the_u_statistic() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(7, 3)), rng.normal(size=(7, 4)) + 5.0
    k, m = x @ x.T, y @ y.T
    found = unbiased_hsic(*(torch.tensor(each - np.diag(np.diag(each))) for each in (k, m)))
    assert found == pytest.approx(plain.hsic(k, m), rel=1e-9)


def test_quantiles_from_a_histogram() -> None:
    values = np.random.default_rng(0).beta(2, 9, size=20_000) * 2
    counts, _ = np.histogram(values, HISTOGRAM_EDGES)
    for share in (0.1, 0.5, 0.9, 0.99):
        assert histogram_quantile(counts, share) == pytest.approx(np.quantile(values, share), rel=0.03)
    one_bin = np.zeros(len(HISTOGRAM_EDGES) - 1)
    one_bin[7] = 4
    assert HISTOGRAM_EDGES[7] < histogram_quantile(one_bin, 0.5) < HISTOGRAM_EDGES[8]


# Against numpy ----------------------------------------------------------------------------------------------------


def test_distances_equal_numpy(tiny: LoadedModel, few: Task, prompts: list[plain.Prompt]) -> None:
    table = finish(measure_redundancy(tiny, few, ("distance",), batch_size=6))
    for group in GROUPS:
        for layer in range(LAYERS):
            pairs = [(p.states[layer][p.groups[group]], p.states[layer + 1][p.groups[group]]) for p in prompts]
            distances = [plain.distance(x, y) for x, y in pairs]
            updates = [np.linalg.norm(y - x, axis=1) / np.linalg.norm(y, axis=1) for x, y in pairs]
            tails = [(each > 0.5).astype(float) for each in distances]
            for name, samples in (
                ("cosine_distance", distances),
                ("relative_update", updates),
                ("cosine_distance_tail@0.5", tails),
            ):
                row = table.row(name, group, layer)
                mean, error = plain.ratio(samples)
                assert row is not None and row.n == sum(map(len, samples))
                assert row.value == pytest.approx(mean, rel=1e-4, abs=1e-9)
                assert row.standard_error == pytest.approx(error, rel=1e-2, abs=1e-9)
            median = table.row("cosine_distance_quantile@0.5", group, layer)
            assert median is not None
            assert median.value == pytest.approx(np.quantile(np.concatenate(distances), 0.5), rel=0.08)


def test_what_parts_add_equals_numpy(tiny: LoadedModel, few: Task) -> None:
    middles: list[np.ndarray] = []
    with ExitStack() as hooks:
        for layer in tiny.model.model.language_model.layers:
            norm = layer.post_attention_layernorm  # it reads the state between attention and the MLP
            hooks.callback(
                norm.register_forward_pre_hook(lambda _, args: middles.append(args[0][0].double().numpy())).remove
            )
        prompts = plain.prompts(tiny, few)
    table = finish(measure_redundancy(tiny, few, ("operators",), batch_size=6))
    for group in GROUPS:
        for layer in range(LAYERS):
            triples = [
                tuple(state[p.groups[group]] for state in (p.states[layer], middle, p.states[layer + 1]))
                for p, middle in zip(prompts, middles[layer::LAYERS], strict=True)
            ]
            for part, (first, second) in (("attention", (0, 1)), ("mlp", (1, 2))):
                distances = [plain.distance(each[first], each[second]) for each in triples]
                shares = [
                    np.linalg.norm(each[second] - each[first], axis=1) / np.linalg.norm(each[2] - each[0], axis=1)
                    for each in triples
                ]
                angles = [np.arccos(1 - each) / np.pi for each in distances]
                for name, samples in (("distance", distances), ("share", shares), ("angle", angles)):
                    row = table.row(f"operator_{name}@{part}", group, layer)
                    mean, error = plain.ratio(samples)
                    assert row is not None and row.n == sum(map(len, samples))
                    assert row.value == pytest.approx(mean, rel=1e-3, abs=1e-6)
                    assert row.standard_error == pytest.approx(error, rel=2e-2, abs=1e-6)


def test_layers_that_cannot_be_taken_apart_have_no_parts(
    tiny: LoadedModel, few: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = tiny.model.model.language_model.layers[2]
    monkeypatch.setitem(layer._modules, "ffn", torch.nn.Identity())  # which of the two is its MLP?
    sums = measure_redundancy(tiny, few, ("operators",))
    assert sums.kinds["operators"].refused == {"2": "it has 2 modules that are its MLP by name, not one"}
    table = finish(sums)
    assert table.row("operator_share@mlp", "text", 2) is None and table.row("operator_share@mlp", "text", 3) is not None


def test_cka_equals_numpy(tiny: LoadedModel, few: Task, prompts: list[plain.Prompt]) -> None:
    single = replace(few, calibration=few.calibration[:1])  # one prompt: one minibatch, every token in it
    table = finish(measure_redundancy(tiny, single, ("cka",)))
    for group in TOKEN_GROUPS:
        for layer in (0, 4):
            x, y = (prompts[0].states[depth][prompts[0].groups[group]] for depth in (layer, layer + 1))
            k, m = x @ x.T, y @ y.T
            if len(x) > 12:  # the U-statistic takes n^4 steps
                continue
            expected = plain.hsic(k, m) / np.sqrt(plain.hsic(k, k) * plain.hsic(m, m))
            row = table.row("cka", group, layer)
            assert row is not None and row.value == pytest.approx(expected, rel=1e-3)
    assert table.row("cka", "text", 0) is not None


def test_vision_attention_equals_numpy(tiny: LoadedModel, few: Task, prompts: list[plain.Prompt]) -> None:
    assert tiny.model.config.text_config._attn_implementation == "sdpa"
    table = finish(measure_redundancy(tiny, few, ("attention",), batch_size=3))
    assert tiny.model.config.text_config._attn_implementation == "sdpa"
    for group in ("text", "last"):
        for layer in range(LAYERS):
            mass = [p.attentions[layer][:, :, p.vision].sum(-1).mean(0)[p.groups[group]] for p in prompts]
            mean, error = plain.ratio(mass)
            row = table.row("vision_attention", group, layer)
            assert row is not None and row.value == pytest.approx(mean, rel=1e-4)
            assert row.standard_error == pytest.approx(error, rel=1e-2)


def test_angles_equal_numpy(tiny: LoadedModel, few: Task, prompts: list[plain.Prompt]) -> None:
    table = finish(measure_redundancy(tiny, few, ("angular",)))
    for start, length in ((0, 1), (5, 1), (1, 3), (0, 6)):
        angles = [
            np.arccos(1 - plain.distance(p.states[start][-1], p.states[start + length][-1])) / np.pi for p in prompts
        ]
        row = table.row(f"angular_distance@{length}", "last", start)
        assert row is not None and row.value == pytest.approx(np.mean(angles), rel=1e-4)
    assert table.row("angular_distance@3", "last", 4) is None  # such a block would reach beyond the last layer


def test_propagation_and_contribution_equal_whole_passes(
    tiny: LoadedModel, captioned: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = captioned
    whole = [plain.greedy(tiny.model, tiny, task, sample) for sample in task.calibration]
    # A token that ends some answers early, so that there is padding behind them.
    end = next(token for token in whole[0][1:] if any(token not in other for other in whole))
    monkeypatch.setattr(tiny.model.generation_config, "eos_token_id", end)
    answers = [plain.greedy(tiny.model, tiny, task, sample) for sample in task.calibration]
    assert len({len(answer) for answer in answers}) > 1
    kinds = ("propagation", "causal", "operator_causal", "withdrawal")
    table = finish(measure_redundancy(tiny, task, kinds, batch_size=3))
    asked = list(zip(task.calibration, answers, strict=True))
    dense = [plain.forward(tiny.model, tiny, task, sample, answer=answer) for sample, answer in asked]

    def under(plan: str) -> list[plain.Prompt]:
        return [plain.forward(tiny.model, tiny, task, sample, plan, answer) for sample, answer in asked]

    for layer in range(LAYERS):
        removed = under("R" * layer + "S" + "R" * (LAYERS - layer - 1))
        for group in ("vision", "answer"):
            gains, changes = [], []
            for prompt, without in zip(dense, removed, strict=True):
                here = prompt.groups[group]
                moved = np.linalg.norm((without.states[-1] - prompt.states[-1])[here])
                gains.append(moved / np.linalg.norm((prompt.states[layer + 1] - prompt.states[layer])[here]))
                changes.append(moved / np.linalg.norm(prompt.states[-1][here]))
            for name, values in (("propagation_gain", gains), ("final_change", changes)):
                row = table.row(name, group, layer)
                assert row is not None and row.value == pytest.approx(np.mean(values), rel=1e-3)
                assert row.standard_error == pytest.approx(np.std(values, ddof=1) / np.sqrt(len(values)), rel=2e-2)
        plans = {
            f"layer_contribution@{name}": "R" * layer + letter + "R" * (LAYERS - layer - 1)
            for letter, name in (
                ("F", "freeze"),
                ("B", "bypass"),
                ("S", "skip"),
                ("A", "skip_attention"),
                ("M", "skip_mlp"),
                ("Q", "freeze_attention"),
                ("P", "freeze_mlp"),
            )
        }
        plans |= {
            "withdrawal": "R" * layer + "B" * (LAYERS - layer),
            "final_divergence": plans["layer_contribution@skip"],
        }
        for name, plan in plans.items():
            found = [plain.kl(prompt.logits, other.logits) for prompt, other in zip(dense, under(plan), strict=True)]
            for group, values in (("last", [each[0] for each in found]), ("answer", [each.mean() for each in found])):
                row = table.row(name, group, layer)
                assert row is not None and row.n == len(values)
                assert row.value == pytest.approx(np.mean(values), rel=1e-3, abs=1e-7), (name, group)
    last = table.row("propagation_gain", "all", LAYERS - 1)
    assert last is not None and last.value == pytest.approx(1.0, rel=1e-5)  # nothing is above the last layer
    frozen = table.row("layer_contribution@freeze", "answer", LAYERS - 1)
    assert frozen is not None and frozen.value == pytest.approx(0.0, abs=1e-9)  # nobody reads the last vision states


def test_trials_are_whole_passes_on_every_other_shard(tiny: LoadedModel, captioned: Task) -> None:
    shards = [measure_redundancy(tiny, captioned, ("trials",), shard=shard, shards=3) for shard in range(3)]
    table = finish(merge(shards))
    assert not shards[1].kinds["trials"].added["kl"].any() and not sum(shards[1].layer_executions.values())
    tried = [each for shard in (0, 2) for each in captioned.calibration[shard::3]]
    asked = [(sample, plain.greedy(tiny.model, tiny, captioned, sample)) for sample in tried]
    dense = [plain.forward(tiny.model, tiny, captioned, sample, answer=answer) for sample, answer in asked]
    for letter, action in (("F", "freeze"), ("B", "bypass"), ("S", "skip")):
        for layer in (0, 3):
            plan = "R" * layer + letter + "R" * (LAYERS - layer - 1)
            pairs = [
                (prompt.logits, plain.forward(tiny.model, tiny, captioned, sample, plan, answer).logits)
                for prompt, (sample, answer) in zip(dense, asked, strict=True)
            ]
            row = table.row(f"trial_divergence@{action}", "answer", layer)
            assert row is not None and row.n == len(tried)
            assert row.value == pytest.approx(np.mean([plain.kl(*pair).mean() for pair in pairs]), rel=1e-3, abs=1e-7)


def test_answers_end_before_a_vision_token(tiny_directory: Path, tiny: LoadedModel, captioned: Task) -> None:
    task = replace(captioned, calibration=captioned.calibration[:2])
    words = plain.greedy(tiny.model, tiny, task, task.calibration[0])
    drawing = load_model(ModelSource(str(tiny_directory), device="cpu"))
    image = drawing.processor.image_token_id
    with torch.no_grad():  # it says the placeholder of images where it would say its first word
        drawing.model.lm_head.weight[image] = 2 * drawing.model.lm_head.weight[words[0]]
    one = task.spec.answer.model_copy(update={"max_new_tokens": 2})
    shortest = replace(task, spec=task.spec.model_copy(update={"answer": one}))
    assert plain.greedy(drawing.model, drawing, shortest, task.calibration[0]) == [image]
    found = measure_redundancy(drawing, task, ("propagation",))
    assert found.samples == 2 and found.failed_samples == {}
    assert before_vision(torch.tensor([4, 9, 3, 9]), (8, 9)).tolist() == [4]
    assert before_vision(torch.tensor([4, 3]), ()).tolist() == [4, 3]


def test_a_model_that_gives_one_logit_is_measured_at_the_first_token(tiny_directory: Path, captioned: Task) -> None:
    model = load_model(ModelSource(str(tiny_directory), device="cpu"))

    def cut(_: object, __: object, output: ModelOutput) -> None:
        output.logits = output.logits[:, -1:]

    task = replace(captioned, calibration=captioned.calibration[:2])
    with model.model.register_forward_hook(cut):
        found = measure_redundancy(model, task, ("propagation",))
    assert found.failed_samples == {}
    (note,) = found.notes
    assert re.fullmatch(
        r"harm is measured at .* first token alone: the model gives logits of 1 of the \d tokens .*", note
    )
    table = finish(found)
    assert table.values("final_divergence", "answer") == table.values("final_divergence", "last")


def test_a_choice_is_measured_where_the_prompt_ends(tiny: LoadedModel, few: Task) -> None:
    task = replace(few, calibration=few.calibration[:3])
    spec = task.spec.model_copy(update={"answer": task.spec.answer.model_copy(update={"kind": "choice"})})
    table = finish(measure_redundancy(tiny, replace(task, spec=spec), ("propagation",)))
    assert table.values("final_divergence", "answer") == table.values("final_divergence", "last")


def test_only_so_many_samples_are_scored_as_asked_for(tiny: LoadedModel, few: Task) -> None:
    shards = [measure_redundancy(tiny, few, ("distance",), shard=shard, shards=2, n_samples=5) for shard in (0, 1)]
    alone = measure_redundancy(tiny, replace(few, calibration=few.calibration[:5]), ("distance",))
    assert [each.samples for each in shards] == [3, 2] and alone.samples == 5
    found = finish(merge(shards)).values("cosine_distance", "all")
    assert found == pytest.approx(finish(alone).values("cosine_distance", "all"), rel=1e-5)


# Odd inputs -------------------------------------------------------------------------------------------------------


def test_a_layer_that_writes_into_its_input_is_measured_all_the_same(tiny: LoadedModel, few: Task) -> None:
    kinds = ("distance", "propagation", "causal")
    expected = finish(measure_redundancy(tiny, few, kinds))
    layer = tiny.model.model.language_model.layers[2]
    # The next layer gets the same state; the tensor that came in does not hold the old one any more.
    handle = layer.register_forward_hook(lambda _, inputs, output: inputs[0].copy_(output))
    found = finish(measure_redundancy(tiny, few, kinds))
    handle.remove()
    for name, group in columns(expected):
        assert found.values(name, group) == pytest.approx(expected.values(name, group), rel=1e-5, abs=1e-9)


def test_samples_without_a_usable_image_are_not_counted(tiny: LoadedModel, few: Task, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    first, *rest = few.calibration
    broken = replace(first, image=ImageFile(str(tmp_path / "broken.png")))
    kinds = ("distance", "attention", "probes")
    some = measure_redundancy(tiny, replace(few, calibration=(broken, *rest)), kinds)
    without = measure_redundancy(tiny, replace(few, calibration=tuple(rest)), kinds)
    assert some.samples == without.samples == len(rest)
    assert list(some.failed_samples) == [broken.id] and without.failed_samples == {}
    assert finish(some).values("cosine_distance", "all") == pytest.approx(
        finish(without).values("cosine_distance", "all"), rel=1e-5
    )
    none = measure_redundancy(tiny, replace(few, calibration=(broken,)), kinds)
    with pytest.raises(MeasurementError, match="none of its images"):
        finish(none)


def test_samples_whose_logits_hold_nan_are_left_out(tiny_directory: Path, tiny: LoadedModel, few: Task) -> None:
    poisoned = load_model(ModelSource(str(tiny_directory), device="cpu"))
    word = poisoned.processor.tokenizer("triangle", add_special_tokens=False)["input_ids"][0]
    with torch.no_grad():
        poisoned.model.get_input_embeddings().weight[word] = float("nan")
    samples = [replace(each, question="is it red?") for each in few.calibration]
    rest = (*samples[:2], *samples[3:])
    samples[2] = replace(samples[2], question="triangle?")
    some = measure_redundancy(poisoned, replace(few, calibration=tuple(samples)), ("distance",))
    without = measure_redundancy(tiny, replace(few, calibration=rest), ("distance",))
    assert some.failed_samples == {samples[2].id: "the logits hold NaN"} and some.samples == len(rest)
    assert finish(some).values("cosine_distance", "all") == pytest.approx(
        finish(without).values("cosine_distance", "all"), rel=1e-5
    )


@pytest.mark.parametrize("largest", [2, 0])
def test_lack_of_memory_halves_the_batches_then_fails_samples(tiny: LoadedModel, few: Task, largest: int) -> None:
    task = replace(few, calibration=few.calibration[:5])
    expected = finish(measure_redundancy(tiny, task, ("distance",))).values("cosine_distance", "all")

    def run_out(module: object, arguments: tuple[torch.Tensor, ...]) -> None:
        if arguments[0].shape[0] > largest:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    handle = tiny.model.model.language_model.layers[3].register_forward_pre_hook(run_out)
    found = measure_redundancy(tiny, task, ("distance",))
    handle.remove()
    if largest:
        assert finish(found).values("cosine_distance", "all") == pytest.approx(expected, rel=1e-5)
    assert set(found.failed_samples.values()) == (set() if largest else {"out of memory at batch size 1"})
    assert len(found.failed_samples) == (0 if largest else 5)


def test_an_unknown_kind_is_named(tiny: LoadedModel, few: Task) -> None:
    with pytest.raises(MeasurementError, match=r"no such kind of measurement: wisdom; known are distance"):
        measure_redundancy(tiny, few, ("wisdom",))
