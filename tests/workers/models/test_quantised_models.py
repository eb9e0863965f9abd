"""Quantised models run as they are, equal to the weights that theirs stand for, and lose layers byte by byte."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import quantised
import tiny_llava
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

from optimizer.errors import UsageFault
from optimizer.job.inputs import find_model
from optimizer.job.spec import JobSpec
from workers.errors import ModelError
from workers.evaluation.dispatch import EvaluationDispatch
from workers.evaluation.plain import PlainEvaluator
from workers.messages import EvaluatePlans, ModelSource
from workers.models.checkpoint import quantisation_method
from workers.models.loading import LoadedModel, load_model
from workers.runtime import GapMap, PlanError, SkipPlan, apply, save_pruned
from workers.runtime.cutting import plan_cut
from workers.runtime.folding import FoldingError, fold_site
from workers.runtime.locate import locate
from workers.serving.checkpoint import write_checkpoint
from workers.tasks import Task

WEIGHT_ONLY = ("int8", "fp8", "w4a16", "fp8-blocks")
PLAN = "RSRRSR"
IN_16_BITS = ("layers.2.mlp.down_proj", "layers.4.self_attn.q_proj")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quantised")


def pair(saved: Path, kind: str) -> tuple[Path, Path]:
    if not (saved / kind).is_dir():
        quantised.save(saved, kind, ignore=IN_16_BITS)
    return saved / kind, saved / f"{kind}-dequantised"


def load(directory: Path, dtype: str = "auto") -> LoadedModel:
    return load_model(ModelSource(str(directory), device="cpu", dtype=dtype))


def logits(model: torch.nn.Module, plan: str | None = None) -> Tensor:
    ids = torch.arange(10, 34)[None]
    with torch.no_grad(), apply(model, SkipPlan.parse(plan or "R" * len(locate(model).layers))):
        found: Tensor = model(input_ids=ids).logits
    return found


@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize("kind", WEIGHT_ONLY)
def test_plans_give_the_logits_of_the_dequantised_model(saved: Path, kind: str, dtype: str) -> None:
    packed, plain = pair(saved, kind)
    ours, theirs = load(packed, dtype), load(plain, dtype)
    assert ours.dtype == theirs.dtype == (torch.bfloat16 if dtype == "auto" else torch.float32)
    for plan in ("RRRRRR", PLAN, "SRRRRS"):
        assert torch.equal(logits(ours.model, plan), logits(theirs.model, plan)), plan
    assert not torch.equal(logits(ours.model, PLAN), logits(ours.model))
    assert ours.parameters >= theirs.parameters  # scales beside the weights


def test_activations_are_quantised_where_the_format_says_so(saved: Path) -> None:
    packed, plain = pair(saved, "int8-dynamic")
    ours, theirs = load(packed, "float32"), load(plain, "float32")
    x = torch.randn(2, 3, 96, generator=torch.Generator().manual_seed(0))
    mine, dense = (each.model.model.language_model.layers[0].mlp.down_proj for each in (ours, theirs))
    scale = x.abs().amax(-1, keepdim=True) / 127.5  # of every token: integers from -128 to 127
    rounded = (x / scale).round().clamp(-128, 127) * scale
    torch.testing.assert_close(mine(x), dense(rounded), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(mine(x), dense(x), rtol=1e-5, atol=1e-5)


def test_the_shared_evaluation_scores_quantised_plans_as_the_dequantised_model(saved: Path, small_task: Task) -> None:
    request = EvaluatePlans(("RRRRRR", PLAN, "SRFRBS"), "search", 4, path="fast")
    texts = []
    for directory in pair(saved, "int8"):
        plain = PlainEvaluator(load(directory), small_task)
        found = EvaluationDispatch(plain, memory_bytes=1 << 28).evaluate(request).results
        slow = plain.evaluate_all(request).results
        assert [each.scores for each in found] == [each.scores for each in slow]  # type: ignore[union-attr]
        answers = [plain.answer(SkipPlan.parse(plan), small_task.search[:4]) for plan in request.plans]
        texts.append((found, [repr(each) for each in answers]))
    assert texts[0][1] == texts[1][1]
    assert [each.scores for each in texts[0][0]] == [each.scores for each in texts[1][0]]


def raw(directory: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Dtype, shape and bytes of every tensor, read without torch."""
    found = {}
    for file in directory.glob("*.safetensors"):
        content = file.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        for name, entry in json.loads(content[8:start]).items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                found[name] = (entry["dtype"], entry["shape"], content[start + first : start + last])
    return found


JOINED = "SMARRR"
ATTENTION_OF = {PLAN: [0, 2, 3, 5], JOINED: [1, 3, 4, 5]}
MLP_OF = {PLAN: [0, 2, 3, 5], JOINED: [2, 3, 4, 5]}
"""By plan, the layers that the parts of the four new ones are of."""
STILL_IN_16_BITS = {
    PLAN: ["layers.1.mlp.down_proj"],
    JOINED: ["layers.0.mlp.down_proj", "layers.2.self_attn.q_proj"],
}
"""Layers 2 and 4 held a projection in 16 bits: of the first plan's, 2 is layer 1 now and 4 is gone."""


def expected_after_cut(before: dict[str, tuple[str, list[int], bytes]], plan: str) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in before.items():
        match = re.fullmatch(r"(language_model\.model\.layers\.)(\d+)\.(.*)", name)
        if match is None:
            found[name] = value
            continue
        of = MLP_OF if re.match(r"mlp\.|post_attention_layernorm\.", match[3]) else ATTENTION_OF
        if int(match[2]) in of[plan]:
            found[f"{match[1]}{of[plan].index(int(match[2]))}.{match[3]}"] = value
    return found


@pytest.mark.parametrize(
    ("kind", "plan"), [*((kind, PLAN) for kind in quantised.FORMATS), ("int8", JOINED), ("fp8-blocks", JOINED)]
)
def test_layers_are_cut_out_and_kept_tensors_stay_byte_for_byte(
    saved: Path, tmp_path: Path, kind: str, plan: str
) -> None:
    packed, _ = pair(saved, kind)
    loaded, output = load(packed), tmp_path / "out"
    write_checkpoint(loaded, SkipPlan.parse(plan), output)
    assert raw(output) == expected_after_cut(raw(packed), plan)
    config = json.loads((output / "config.json").read_text())
    assert config["text_config"]["num_hidden_layers"] == 4
    settings = json.loads((packed / "config.json").read_text())["quantization_config"]
    key = "modules_to_not_convert" if kind == "fp8-blocks" else "ignore"
    assert config["quantization_config"] | {key: 0} == settings | {key: 0}
    if kind == "fp8-blocks":
        assert config["quantization_config"][key] == [*settings[key][:3], *STILL_IN_16_BITS[plan]]
    else:  # by their names in memory and in the files
        prefixes = ("model.language_model", "language_model.model")
        names = {f"{prefix}.{name}" for prefix in prefixes for name in STILL_IN_16_BITS[plan]}
        assert set(config["quantization_config"][key]) == {*quantised.IGNORED, *names}
    again = AutoModelForImageTextToText.from_pretrained(output, dtype="auto")
    assert torch.equal(logits(again), logits(loaded.model, plan))


def test_of_a_layer_that_the_settings_name_whole_the_part_that_stays_is_named(saved: Path, tmp_path: Path) -> None:
    packed, _ = pair(saved, "int8")
    copy, layers = Path(shutil.copytree(packed, tmp_path / "copy")), "model.language_model.layers"
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["ignore"] = [f"{layers}.{layer}" for layer in (1, 2, 4)]
    (copy / "config.json").write_text(json.dumps(config))
    cut = plan_cut(locate(load(packed).model), SkipPlan.parse(JOINED), copy, original_names=True)
    attention, mlp = ("self_attn", "input_layernorm"), ("mlp", "post_attention_layernorm")
    expected = {*(f"{layers}.0.{part}" for part in (*attention, *mlp)), f"{layers}.2"}
    assert set(cut.quantisation[""]["ignore"]) == expected


def test_a_checkpoint_of_several_files_loses_those_that_are_left_empty(saved: Path, tmp_path: Path) -> None:
    packed, _ = pair(saved, "int8")
    source = Path(shutil.copytree(packed, tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    shards: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        layer = re.search(r"language_model\.model\.layers\.(\d+)", name)
        shards.setdefault(f"part-{layer[1] if layer else 'rest'}.safetensors", {})[name] = tensor
    for file, part in shards.items():
        save_file(part, source / file, metadata={"format": "pt"})
    weight_map = {name: file for file, part in shards.items() for name in part}
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    write_checkpoint(load(source), SkipPlan.parse(PLAN), tmp_path / "out")
    assert raw(tmp_path / "out") == expected_after_cut(raw(source), PLAN)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    files = {f"model-{number:05d}-of-00005.safetensors" for number in range(1, 6)}
    assert {path.name for path in (tmp_path / "out").glob("*.safetensors")} == set(index.values()) == files
    for name, file in index.items():
        with safe_open(tmp_path / "out" / file, framework="pt") as opened:
            assert name in opened.keys()  # noqa: SIM118 - no mapping


def test_what_cannot_be_saved_is_refused_with_the_reason(saved: Path, tmp_path: Path) -> None:
    packed, _ = pair(saved, "int8")
    model = load(packed).model
    with pytest.raises(PlanError, match=r"quantised \(compressed-tensors\) and are copied .* give their directory"):
        save_pruned(model, SkipPlan.parse(PLAN), tmp_path / "out")
    maps = {0: GapMap(0, 1, torch.eye(48))}
    with pytest.raises(PlanError, match=r"maps cannot be folded into quantised weights \(compressed-tensors\)"):
        save_pruned(model, SkipPlan.parse(PLAN), tmp_path / "out", compensation=maps, checkpoint=packed)
    assert not list(tmp_path.iterdir())


def test_compensation_is_refused_before_and_in_a_worker(saved: Path) -> None:
    packed, plain = pair(saved, "fp8")
    assert (quantisation_method(packed), quantisation_method(plain)) == ("compressed-tensors", "")
    assert quantisation_method(pair(saved, "fp8-blocks")[0]) == "fp8"

    def job(directory: Path, kind: str) -> JobSpec:
        fields = {"model": {"path": str(directory)}, "task": "easy-vqa", "compensation": {"kind": kind}}
        return JobSpec.model_validate(fields)

    for kind in ("linear", "both"):
        assert find_model(job(plain, kind)) == plain
        with pytest.raises(
            UsageFault, match=rf"compensation.kind: {kind} needs weights .* quantised \(compressed-tens"
        ):
            find_model(job(packed, kind))
    assert find_model(job(packed, "none")) == packed
    stack = locate(load(packed).model)
    with pytest.raises(FoldingError, match="its projection down_proj is a quantised Linear, not a plain linear one"):
        fold_site(stack, 0)
    assert len(fold_site(stack, 2).projections) == 1  # the one in 16 bits is a plain one


def test_scales_that_would_not_be_read_are_no_small_matter(saved: Path, tmp_path: Path) -> None:
    packed, _ = pair(saved, "int8")
    copy = Path(shutil.copytree(packed, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["targets"] = ["re:.*mlp.*"]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"reads its quantised weights without \S*k_proj\.weight_scale$"):
        load(copy)


def test_nothing_is_printed_while_a_quantised_model_is_loaded(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    packed, _ = pair(saved, "w4a16")
    logging.disable_progress_bar()
    try:
        load(packed)
    finally:
        logging.enable_progress_bar()
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
def test_weights_of_bitsandbytes_are_searched_and_cut(tmp_path: Path, bits: int) -> None:
    pytest.importorskip("bitsandbytes", reason="130 MB; install skipplan[bitsandbytes]")
    from transformers import BitsAndBytesConfig

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    tiny_llava.save(tmp_path / "plain", sizes=sizes)
    kinds = {
        8: BitsAndBytesConfig(load_in_8bit=True),
        4: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    }
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "plain", quantization_config=kinds[bits])
    model.save_pretrained(tmp_path / "packed")
    tiny_llava.build_processor().save_pretrained(tmp_path / "packed")
    loaded = load(tmp_path / "packed")
    write_checkpoint(loaded, SkipPlan.parse(PLAN), tmp_path / "out")
    assert raw(tmp_path / "out") == expected_after_cut(raw(tmp_path / "packed"), PLAN)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype="auto")
    assert torch.equal(logits(again), logits(loaded.model, PLAN))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_weights_of_gptq_and_awq_are_searched_and_cut(
    tmp_path: Path, kind: str, small_task: Task, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gptqmodel", reason="install gptqmodel and optimum")
    packed, plain = quantised.save(tmp_path, kind)
    theirs = load(plain, "float16")
    capfd.readouterr()
    ours = load(packed)
    assert "INFO" not in capfd.readouterr().out  # commands print JSON there
    assert ours.dtype == torch.float16
    for plan in ("RRRRRR", PLAN):  # weights are unpacked in float16 for every product
        torch.testing.assert_close(logits(ours.model, plan), logits(theirs.model, plan), rtol=0.01, atol=0.03)
    assert not torch.allclose(logits(ours.model, PLAN), logits(ours.model), atol=0.3)
    evaluator = PlainEvaluator(ours, small_task)
    request = EvaluatePlans(("RRRRRR", PLAN, "SRFRBS"), "search", 4)
    found = EvaluationDispatch(evaluator, memory_bytes=1 << 28).evaluate(request).results
    slow = evaluator.evaluate_all(request).results
    assert [each.scores for each in found] == [each.scores for each in slow]  # type: ignore[union-attr]
    write_checkpoint(ours, SkipPlan.parse(PLAN), tmp_path / "out")
    assert raw(tmp_path / "out") == expected_after_cut(raw(packed), PLAN)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype="auto")
    assert torch.equal(logits(again), logits(ours.model, PLAN))
