"""Plans and tasks in the real lmms-eval: the same scores from both sides, sample by sample.

``SKIPPLAN_LMMS_EVAL_PYTHON`` names the Python of an environment that holds lmms-eval and skipplan's dependencies;
the tests are skipped without it.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import export_builders
import harness_tasks
import pytest
from PIL import Image

from optimizer.exports.importing import import_plan
from storage.database import Database
from workers.evaluation.plain import PlainEvaluator, scores_of
from workers.evaluation.shared.fast import FastEvaluator
from workers.messages import EvaluatePlans, ModelSource
from workers.models.checkpoint import find_checkpoint
from workers.models.loading import LoadedModel, load_model
from workers.runtime import SkipPlan
from workers.tasks import Task, load_spec, load_task
from workers.tasks.harness.bridge import cut
from workers.tasks.harness.process import BRIDGE, PYTHON_VARIABLE

REPOSITORY = Path(__file__).resolve().parents[3]
PYTHON = os.environ.get(PYTHON_VARIABLE, "")
PLAN = "RSSRRRRRRRRR"
SIZES = {"calibration": 2, "search": 8, "held_out": 40}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason=f"{PYTHON_VARIABLE} names no Python with lmms-eval"),
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of YAML tasks."""
    directory = tmp_path_factory.mktemp("lmms-eval") / "tasks"
    harness_tasks.write(directory, sum(SIZES.values()))
    return directory


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("SKIPPLAN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(ModelSource("llava-12"), device="cpu", measuring=True)


def load(tasks: Path, name: str) -> Task:
    return load_task(load_spec(f"lmms-eval:{tasks}/{name}").with_splits(**SIZES))


def harness_samples(tasks: Path, folder: Path, model_args: str) -> dict[str, dict[int, dict[str, Any]]]:
    """Run the harness's own command; what it logged of each sample, by task and document."""
    installed = folder / "installed" / "skipplan-0.1.0.dist-info"
    installed.mkdir(parents=True)
    entry = "skipplan = optimizer.harness.entry:manifest"
    assert f'skipplan = "{entry.split(" = ")[1]}"' in (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    (installed / "entry_points.txt").write_text(f"[lmms_eval.models]\n{entry}\n", encoding="utf-8")
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: skipplan\nVersion: 0.1.0\n", encoding="utf-8")
    command = [PYTHON, "-m", "lmms_eval", "--model", "skipplan", "--model_args", model_args, "--device", "cpu"]
    command += ["--tasks", "matched,overlapping", "--include_path", str(tasks), "--batch_size", "4"]
    command += ["--log_samples", "--output_path", str(folder / "results")]
    paths = os.pathsep.join([str(REPOSITORY), str(installed.parent)])
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": paths}, cwd=folder, capture_output=True, text=True, check=False
    )
    found = {}
    for name in ("matched", "overlapping"):
        files = list((folder / "results").rglob(f"*_samples_{name}.jsonl"))
        assert len(files) == 1, done.stderr[-3000:]
        rows = [json.loads(line) for line in files[0].read_text(encoding="utf-8").splitlines()]
        found[name] = {row["doc_id"]: row for row in rows}
    return found


def test_a_plan_scores_the_same_on_both_sides_sample_by_sample(
    tasks: Path, loaded: LoadedModel, tmp_path: Path
) -> None:
    database = f"sqlite:///{tmp_path / 'plans.db'}"
    document = export_builders.document(PLAN, find_checkpoint(ModelSource("llava-12")))
    document = document.model_copy(update={"model": replace(document.model, name="llava-12")})
    with Database.open(database) as db:
        plan = import_plan(db, document, tmp_path / "skipplan.json")
    logged = harness_samples(tasks, tmp_path, f"plan={plan.id},database={database}")

    values: dict[str, set[float]] = {}
    for name, metrics in (("matched", ("exact_match", "anls")), ("overlapping", ("overlap",))):
        task = load(tasks, name)
        assert task.spec.metrics == tuple(f"lmms-eval:{metric}" for metric in metrics)
        plain = PlainEvaluator(loaded, task, batch_size=8)
        answers = plain.answer(SkipPlan.parse(PLAN), task.held_out)
        own = {sample.document: scores_of(task.spec, sample, answers) for sample in task.held_out}
        assert len(own) == SIZES["held_out"]
        for sample in task.held_out:
            assert sample.document is not None
            row = logged[name][sample.document.number]
            said = row["filtered_resps"]
            ours = cut(answers.texts[sample.id], ["e"] if name == "overlapping" else [])
            assert ours.lower() == (said if isinstance(said, str) else said[0]).lower()
            assert own[sample.document] == tuple(row[metric] for metric in metrics)
        for number, metric in enumerate(metrics):
            values[metric] = {scores[number] for scores in own.values()}
        shared = FastEvaluator(plain).evaluate_all(EvaluatePlans((PLAN,), "held_out"))
        (evaluation,) = shared.results
        assert evaluation.scores == tuple(scores[0] for scores in own.values())  # type: ignore[union-attr]
    assert values["exact_match"] == {0.0, 1.0}
    assert len(values["overlap"]) > 3  # parts of a point, which rounding would show


def test_prompts_images_and_answers_are_the_harnesss(tasks: Path) -> None:
    documents = harness_tasks.questions(sum(SIZES.values()))
    task = load(tasks, "overlapping")
    for sample in task.held_out:
        assert sample.document is not None
        own = documents[sample.document.number]
        assert task.spec.ask(sample.question) == f"Look. {own['question']}"
        assert sample.answers == (own["answer"],)
        with Image.open(own["image"]) as image:
            assert sample.image.open().tobytes() == image.convert("RGB").tobytes()
    assert (task.spec.answer.kind, task.spec.answer.max_new_tokens) == ("short", 6)


def test_a_changed_document_yaml_or_function_is_another_task(tasks: Path, tmp_path: Path) -> None:
    harness_tasks.write(tmp_path / "a", 6)
    sizes = {"calibration": 1, "search": 2, "held_out": 3}

    def hashes(directory: str) -> tuple[str, str]:
        loaded = load_task(load_spec(f"lmms-eval:{tmp_path / directory}/matched").with_splits(**sizes))
        return loaded.data_hash, loaded.definition_hash

    def copied(directory: str, file: str, old: str, new: str) -> tuple[str, str]:
        harness_tasks.write(tmp_path / directory, 6)
        place = tmp_path / directory / file
        content = place.read_text(encoding="utf-8")
        assert old in content
        place.write_text(content.replace(old, new, 1), encoding="utf-8")
        return hashes(directory)

    first = hashes("a")
    assert hashes("a") == first
    data, definition = copied("data", "questions.jsonl", '"answer": "', '"answer": "x')
    assert (data != first[0], definition) == (True, first[1])
    assert copied("yaml", "matched.yaml", "ignore_case: true", "ignore_case: false")[1] != first[1]
    assert copied("included", "common", "max_new_tokens: 6", "max_new_tokens: 7")[1] != first[1]
    assert copied("code", "utils.py", "def pair", "def pairs")[1] != first[1]


def test_guesses_are_the_same_in_every_process(tmp_path: Path) -> None:
    directory = tmp_path / "tasks"
    harness_tasks.write(directory, 6)
    (directory / "guessing.py").write_text(
        "import random\n\ndef guess(doc, results): return {'overlap': random.random()}\n", encoding="utf-8"
    )
    yaml = f"task: guessed\n{harness_tasks.SCORED.format(metric='overlap')}process_results: !function guessing.guess\n"
    (directory / "guessed.yaml").write_text(yaml, encoding="utf-8")
    said = []
    for order in ((0, 1, 2), (2, 0, 1)):
        bridge = Bridge(tmp_path)
        bridge.ask({"open": {"task": "guessed", "include": str(directory)}})
        replies = bridge.ask({"read": {"images": str(tmp_path), "limit": None}})
        contents = [reply["sample"]["hash"] for reply in replies[:-1]]
        scores = {}
        for number in order:
            request = {"document": number, "hash": contents[number], "answer": "?"}
            scores[number] = bridge.ask({"score": request})[0]["scores"]["overlap"]
        said.append(scores)
    assert said[0] == said[1]
    assert len(set(said[0].values())) == 3


def test_the_recording_that_the_fast_tests_read_is_what_the_harness_says(tmp_path: Path) -> None:
    harness_tasks.write(tmp_path / "tasks", 12)
    recorded = (Path(__file__).parents[2] / "fixtures" / "lmms_eval.jsonl").read_text(encoding="utf-8")
    here = recorded.replace("{directory}", str(tmp_path / "tasks")).replace("{images}", str(tmp_path / "images"))
    exchanges = [json.loads(line) for line in here.splitlines()]
    hashes: dict[str, str] = {}  # of documents, which hold the places of images
    done = Bridge(tmp_path)
    for exchange in exchanges:
        request = exchange["request"]
        if "score" in request:
            request["score"]["hash"] = hashes[request["score"]["hash"]]
        replies = done.ask(request)
        assert len(replies) == len(exchange["replies"])
        for said, before in zip(replies, exchange["replies"], strict=True):
            if "sample" in said:
                hashes[before["sample"]["hash"]] = said["sample"]["hash"]
                for place_of_this_machine in ("hash", "content"):
                    del said["sample"][place_of_this_machine], before["sample"][place_of_this_machine]
            for of_a_version in ("version", "identity"):
                assert (said.pop(of_a_version, None) is None) == (before.pop(of_a_version, None) is None)
            assert said == before


REFUSED = {
    "corpus": "letters is computed over all samples (all_letters)",
    "worse": "of overlap less is better",
    "beyond": "points of a sample is 100.0, no number in [0, 1]",
    "judged": "its scores are asked of another model or machine (lmms_eval.llm_judge)",
    "sampled": "its generation_kwargs have temperature: 0.7",
    "chosen": "its output_type is multiple_choice; only answers that are generated in one turn (generate_until)",
    "nothing": "says task: nothing; there are beyond, chosen, corpus, judged, matched, overlapping, pair, sampled",
}


def test_what_cannot_be_taken_over_is_refused_with_the_reason(tasks: Path, tmp_path: Path) -> None:
    bridge = Bridge(tmp_path)
    for name, reason in REFUSED.items():
        (reply,) = bridge.ask({"open": {"task": name, "include": str(tasks)}})
        assert reason in reply["error"]
    bridge.ask({"open": {"task": "pair", "include": str(tasks)}})
    (reply,) = bridge.ask({"read": {"images": str(tmp_path), "limit": None}})
    assert reply == {"error": "document 0 shows 2 images, and every question here is about one"}


class Bridge:
    """The real bridge, asked line by line."""

    def __init__(self, folder: Path) -> None:
        self._process = subprocess.Popen(
            [PYTHON, "-I", str(BRIDGE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=folder,
        )

    def ask(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        replies = [json.loads(self._process.stdout.readline())]
        while "sample" in replies[-1]:
            replies.append(json.loads(self._process.stdout.readline()))
        return replies

    def __del__(self) -> None:
        self._process.kill()
        self._process.wait()
