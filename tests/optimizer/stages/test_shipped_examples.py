"""The shipped example jobs, run to their end: their settings and task files, on rows as their data sets store them.

Of the data set only the source is replaced, by a file of the same columns, and the models by tiny ones of the family.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import in_process
import pytest
import tiny_llava
import tiny_video_families
import yaml
from PIL import Image

from optimizer.job.loading import load_job
from optimizer.preflight.checks import check_job_file
from optimizer.stages import pipeline
from storage.database import Database
from storage.records import plans
from workers.tasks import load_spec

EXAMPLES = Path(__file__).resolve().parents[3] / "configs" / "examples"
FAMILIES = {
    "llava-1.5-7b": "llava",
    "qwen2.5-vl-3b": "qwen2_5_vl",
    "qwen3-vl-4b": "qwen3_vl",
    "smolvlm-256m": "smolvlm",
}
IMAGES = 14
SMALL: dict[str, Any] = {
    "splits": {"unit": "images", "calibration": 2, "search": 4, "held_out": 8},
    "constraint": {"max_accuracy_drop": 1.0, "min_dense_accuracy": 0},
    "search": {"trials": 4, "batch": 4, "finalists": 1, "rungs": [4], "latency_model": "layers"},
    "latency": {"precision": 0.5, "max_seconds": 0.1},
}

Row = Callable[[int], dict[str, Any]]


def vqav2(number: int) -> dict[str, Any]:
    given = ["red"] * (number % 10) + ["dark red"] * (10 - number % 10)
    return {
        "question_type": "what color is the",
        "multiple_choice_answer": "red",
        "answers": [{"answer": each, "answer_confidence": "yes", "answer_id": n} for n, each in enumerate(given, 1)],
        "image_id": 1000 + number,
        "answer_type": "other",
        "question_id": 1000000 + number,
        "question": "What color is the bus?",
    }


def textvqa(number: int) -> dict[str, Any]:
    return {
        "image_id": f"{number:016x}",
        "question_id": 34602 + number,
        "question": "what is the brand of this camera?",
        "question_tokens": ["what", "is", "the", "brand", "of", "this", "camera"],
        "image_width": 1024,
        "image_height": 664,
        "flickr_original_url": "",
        "flickr_300k_url": "",
        "answers": ["dakota", "clos culombu", "dakota digital", *["dakota"] * 6, "nous les gosses"],
        "image_classes": ["Cassette deck", "Printer"],
        "set_name": "val",
        "ocr_tokens": ["DAKOTA", "DIGITAL"],
    }


def scienceqa(number: int) -> dict[str, Any]:
    return {
        "question": "Which of these states is farthest north?",
        "choices": ["West Virginia", "Louisiana", "Arizona", "Oklahoma"][: 2 + number % 3],
        "answer": number % 2,
        "hint": "",
        "task": "closed choice",
        "grade": "grade2",
        "subject": "social science",
        "topic": "geography",
        "category": "Geography",
        "skill": "Read a map: cardinal directions",
        "lecture": "Maps have four cardinal directions.",
        "solution": "To find the answer, look at the compass rose.",
    }


def pope(number: int) -> dict[str, Any]:
    return {
        "id": str(number),
        "question_id": str(number),
        "question": "Is there a snowboard in the image?",
        "answer": "no" if number % 2 else "yes",
        "image_source": f"COCO_val2014_{number:012d}",
        "category": "adversarial",
    }


ROWS: dict[str, Row] = {"vqav2": vqav2, "textvqa": textvqa, "scienceqa": scienceqa, "pope": pope}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directories of tiny models by family, each made once."""
    folder = tmp_path_factory.mktemp("families")

    def model(family: str) -> Path:
        if not (folder / family).exists():
            if family == "llava":
                tiny_llava.save(folder / family)
            else:
                tiny_video_families.save(folder / family, family)
        return folder / family

    return model


def write_job(folder: Path, example: Path, model: Path) -> Path:
    """Write the example's job with its task on a file of the same columns, both otherwise as shipped."""
    job = yaml.safe_load(example.read_text())
    task = yaml.safe_load((EXAMPLES / job["task"]).read_text())
    row = ROWS[task["name"]]
    rows = []
    for number in range(IMAGES):
        Image.new("RGB", (40, 40), (number * 15, 0, 0)).save(folder / f"{number}.jpg")
        rows += [{**row(2 * number + turn), task["source"]["columns"]["image"]: f"{number}.jpg"} for turn in range(2)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task["source"] = {"kind": "file", "path": "rows.jsonl", "columns": task["source"]["columns"]}
    (folder / "task.yaml").write_text(yaml.safe_dump(task))
    job["model"] = {"path": str(model), "device": "cpu", "dtype": "float32"}
    for name, value in SMALL.items():
        job[name] = job.get(name, {}) | value if isinstance(value, dict) else value
    (folder / "job.yaml").write_text(yaml.safe_dump(job | {"task": "task.yaml"}))
    return folder / "job.yaml"


PAIRS = [
    pytest.param(model, task, marks=[] if number % 10 == 0 else pytest.mark.slow)  # two models, two tasks
    for number, (model, task) in enumerate((model, task) for model in FAMILIES for task in ROWS)
]


@pytest.mark.parametrize(("model", "task"), PAIRS)
def test_a_shipped_example_runs_to_its_end(
    tmp_path: Path, models: Callable[[str], Path], store: Database, model: str, task: str
) -> None:
    path = write_job(tmp_path, EXAMPLES / f"{model}-{task}.yaml", models(FAMILIES[model]))
    assert "28 prompts, as the model's processor makes them" in check_job_file(path, environment={}).checked
    spec = load_job(path, environment={})
    assert spec.evaluation == "auto"
    shipped, asked = load_spec(EXAMPLES / "tasks" / f"{task}.yaml"), in_process.prepare(spec).task
    assert (asked.spec.prompt, asked.spec.metrics) == (shipped.prompt, shipped.metrics)
    context = in_process.context(store, in_process.OneWorker(spec.model.path, asked), spec)
    pipeline.run(context)
    published = plans.for_job(store, context.job.id)
    assert published and all(plan.n_samples == 16 for plan in published)
