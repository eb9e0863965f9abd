"""Plans and maps of exports, as the runtime reads them without the rest of the project."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_llava
import torch
from safetensors.torch import save

from workers.compensation.artifact import decode
from workers.runtime import GapMap, PlanError, speculate_from
from workers.runtime import exported as module

RECIPE = "linear tokens=200"


@pytest.fixture
def model() -> Any:
    return tiny_llava.build_model(tiny_llava.build_processor()).eval()


def write(directory: Path, plan: str, compensation: str = "none", maps: bytes | None = None) -> Path:
    (directory / "skipplan.json").write_text(json.dumps({"plan": plan, "compensation": compensation}))
    if maps is not None:
        (directory / "compensation").mkdir()
        (directory / module.MAPS).write_bytes(maps)
    return directory


def content(recipe: str, width: int) -> bytes:
    generator = torch.Generator().manual_seed(0)
    gaps = [{"layer": 0, "end": 2, "share": 1.0}, {"layer": 3, "end": 4, "share": 0.5}]
    tensors = {f"layers.{gap['layer']}.matrix": torch.randn(width, 48, generator=generator) for gap in gaps}
    record = {"format": 1, "plan": "RSSRSR", "compensation": recipe, "gaps": gaps}
    return save(tensors, metadata={"skipplan": json.dumps(record)})


@pytest.mark.parametrize(("recipe", "width"), [(RECIPE, 48), (f"{RECIPE} scope=projection", 96)])
def test_maps_are_those_that_the_project_reads(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, width: int
):
    seen: list[dict[int, GapMap]] = []
    monkeypatch.setattr(module, "speculate", lambda dense, plan, maps, length: seen.append(maps))
    maps = content(recipe, width)
    speculate_from(model, write(tmp_path, "RSSRSR", recipe, maps))
    expected = decode(maps, plan="RSSRSR").maps
    assert seen[0].keys() == expected.keys()
    for layer, own in seen[0].items():
        other = expected[layer]
        assert torch.equal(own.matrix, other.matrix)
        assert (own.layer, own.end, own.share, own.scope) == (other.layer, other.end, other.share, other.scope)


def test_a_compensated_plan_drafts_with_its_maps(model: Any, tmp_path: Path):
    maps = content(RECIPE, 48)
    inputs = {"input_ids": torch.arange(5, 17)[None], "attention_mask": torch.ones(1, 12, dtype=torch.long)}
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    with speculate_from(model, write(tmp_path, "RSSRSR", RECIPE, maps), draft_length=2) as speculation:
        assert torch.equal(speculation.generate(**inputs, **options), model.generate(**inputs, **options))
        folded = 2 * 48 * 96 * 4  # of two gaps, the last projection of the MLP before each in float32
        assert speculation.statistics.extra_bytes >= folded


def test_what_is_missing_is_said(model: Any, tmp_path: Path):
    with pytest.raises(PlanError, match=r"skipplan\.json is not the plan of an export"):
        speculate_from(model, tmp_path)
    write(tmp_path, "RSSRSR", RECIPE)
    with pytest.raises(PlanError, match=r"maps\.safetensors does not hold the plan's maps"):
        speculate_from(model, tmp_path)
    (tmp_path / "compensation").mkdir()
    (tmp_path / module.MAPS).write_bytes(b"\x04\0\0\0\0\0\0\0{}  ")
    with pytest.raises(PlanError, match=r"does not hold the plan's maps: '__metadata__'"):
        speculate_from(model, tmp_path)
