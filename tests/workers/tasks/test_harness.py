"""Tasks of lmms-eval, by what the real one (0.7.3) said: tests/fixtures/lmms_eval.jsonl holds requests and replies.

``tests/optimizer/harness`` compares the recording with lmms-eval where there is one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import harness_tasks
import pytest
from PIL import Image

from workers.errors import TaskError
from workers.tasks import Task, load_spec, load_task, parse_spec
from workers.tasks.chance import chance
from workers.tasks.harness import process, source
from workers.tasks.harness.bridge import Refused, _judge, cut, one_image, sampling, stops
from workers.tasks.loading import hash_definition
from workers.tasks.scoring import score_answer

RECORDING = Path(__file__).parents[2] / "fixtures" / "lmms_eval.jsonl"
REPLAY = f"""\
#!{sys.executable}
import json, sys
recorded = open({str(RECORDING)!r}).read().replace("{{directory}}", {{directory!r}}).replace("{{images}}", {{images!r}})
replies = {{}}
for line in recorded.splitlines():
    exchange = json.loads(line)
    replies[json.dumps(exchange["request"])] = exchange["replies"]
for line in sys.stdin:
    for reply in replies[line.strip()]:
        print(json.dumps(reply), flush=True)
"""
SIZES = {"calibration": 2, "search": 4, "held_out": 6}


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The directory of tasks that was recorded, with a program in the harness's place that says what was recorded."""
    directory = tmp_path / "tasks"
    harness_tasks.write(directory, 12)
    program = tmp_path / "replay"
    monkeypatch.setenv("SKIPPLAN_CACHE", str(tmp_path / "cache"))
    images = tmp_path / "cache" / "lmms-eval"
    program.write_text(REPLAY.replace("{directory!r}", repr(str(directory))).replace("{images!r}", repr(str(images))))
    program.chmod(0o755)
    monkeypatch.setenv(process.PYTHON_VARIABLE, str(program))
    process.opened.cache_clear()
    yield directory
    process.opened.cache_clear()  # which ends the programs


def load(tasks: Path, name: str = "overlapping") -> Task:
    return load_task(load_spec(f"lmms-eval:{tasks}/{name}").with_splits(**SIZES))


def test_a_task_has_the_harnesss_prompts_answers_and_metrics(tasks: Path) -> None:
    task = load(tasks)
    documents = harness_tasks.questions(12)
    assert task.name == "lmms-eval:overlapping"
    assert (task.spec.metric, task.spec.secondary) == ("lmms-eval:overlap", ())
    assert (task.spec.answer.kind, task.spec.answer.max_new_tokens) == ("short", 6)
    samples = [*task.calibration, *task.search, *task.held_out]
    assert len(samples) == len({sample.image_key for sample in samples}) == 12
    for sample in samples:
        assert sample.document is not None
        own = documents[sample.document.number]
        assert (task.spec.ask(sample.question), sample.answers) == (f"Look. {own['question']}", (own["answer"],))


def test_answers_score_what_the_harness_says(tasks: Path) -> None:
    task = load(tasks)
    first = next(s for split in SIZES for s in task.split(split) if s.document is not None and s.document.number == 0)
    assert first.answers == ("triangle",)
    # Letters that both have over those that either has, of the answer before the stop text "e".
    for answer, score in {"triangle": 7 / 8, "Triangle": 7 / 8, "blue": 1 / 10, "square and more": 2 / 11}.items():
        assert score_answer(task.spec, first, answer) == pytest.approx((score,))


def test_an_answer_is_scored_once(tasks: Path) -> None:
    task = load(tasks)
    first = next(s for split in SIZES for s in task.split(split) if s.document is not None and s.document.number == 0)
    before = score_answer(task.spec, first, "blue")
    process.open_task(task.spec.source.task, task.spec.source.include).close()  # type: ignore[union-attr]
    assert score_answer(task.spec, first, "blue") == before


def test_the_harnesss_reasons_are_one_line(tasks: Path) -> None:
    with pytest.raises(TaskError, match=r"^lmms-eval task corpus: none of its metrics is a mean .*all_letters\)$"):
        load(tasks, "corpus")
    with pytest.raises(TaskError, match=f"no YAML file under {tasks} says task: nothing; there are beyond"):
        load(tasks, "nothing")
    spec = {"name": "own", "splits": SIZES}
    source = {"kind": "lmms-eval", "task": "matched", "include": str(tasks), "metric": "anl"}
    with pytest.raises(TaskError, match=r"source.metric: 'anl' is not .* one of exact_match, anls; did you mean anls"):
        load_task(parse_spec(spec | {"source": source}))


def test_a_task_file_chooses_metric_and_length(tasks: Path, tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    source = "{kind: lmms-eval, task: matched, include: tasks, metric: anls, max_new_tokens: 40}"
    file.write_text(f"name: own\nsource: {source}\nsplits: {{calibration: 2, search: 4, held_out: 6}}\n")
    spec = load_spec(file)
    assert spec.source.include == str(tasks)  # type: ignore[union-attr]
    file.write_text(file.read_text() + "prompt: Say it\n")
    with pytest.raises(TaskError, match="prompt is what lmms-eval says of its task"):
        load_spec(file)
    from workers.tasks.loading import settled

    found = settled(spec)
    assert (found.metric, found.secondary) == ("lmms-eval:anls", ("lmms-eval:exact_match",))
    assert (found.answer.kind, found.answer.max_new_tokens) == ("free", 40)


def test_what_identifies_the_harness_enters_the_definition(tasks: Path) -> None:
    spec = load(tasks).spec
    other = spec.changed(source=spec.source.changed(identity="0" * 64))
    elsewhere = spec.changed(source=spec.source.changed(include="/somewhere/else"))
    assert hash_definition(other) != hash_definition(spec) == hash_definition(elsewhere)


def test_nothing_is_started_before_a_task_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    monkeypatch.delenv(process.PYTHON_VARIABLE, raising=False)
    spec = load_spec("lmms-eval:docvqa_val")
    assert (spec.name, spec.splits.held_out) == ("lmms-eval:docvqa_val", 300)
    with pytest.raises(TaskError, match=f"{process.PYTHON_VARIABLE} is not set; install lmms-eval"):
        load_task(spec)


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("/no/such/python", "names /no/such/python, which is no program"),
        (sys.executable, "lmms-eval cannot be imported: No module named 'lmms_eval'"),
        ("/bin/false", r"the harness ended \(exit code 1\): it said nothing"),
    ],
)
def test_a_harness_that_is_not_there_is_said_in_one_line(
    program: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(process.PYTHON_VARIABLE, program)
    process.opened.cache_clear()
    with pytest.raises(TaskError, match=said) as raised:
        load_task("lmms-eval:docvqa_val")
    assert "\n" not in str(raised.value)


def test_a_harness_that_ends_while_it_scores_is_said_with_its_last_line(
    tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = Path(os.environ[process.PYTHON_VARIABLE])
    ending = 'for line in sys.stdin:\n    if "score" in line: sys.exit("out of luck")\n'
    program.write_text(program.read_text().replace("for line in sys.stdin:\n", ending))
    task = load(tasks)
    with pytest.raises(TaskError, match=r"overlapping: the harness ended \(exit code 1\): out of luck"):
        score_answer(task.spec, task.held_out[0], "never asked before")


def test_a_score_that_takes_too_long_ends_the_harness(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = Path(os.environ[process.PYTHON_VARIABLE])
    waiting = "for line in sys.stdin:\n    if line.startswith('{\"score'): import time; time.sleep(60)\n"
    program.write_text(program.read_text().replace("for line in sys.stdin:\n", waiting))
    monkeypatch.setattr(process, "SCORE_SECONDS", 0.2)
    task = load(tasks)
    first = next(s for split in SIZES for s in task.split(split) if s.document is not None and s.document.number == 0)
    with pytest.raises(TaskError, match=r"not scored within 0.2 s"):
        score_answer(task.spec, first, "Triangle")
    program.write_text(program.read_text().replace(waiting, "for line in sys.stdin:\n"))
    monkeypatch.setattr(process, "SCORE_SECONDS", 60.0)
    assert score_answer(task.spec, first, "Triangle") == (7 / 8,)  # by another one


def test_another_harness_or_task_than_the_one_that_was_read_scores_nothing(tasks: Path) -> None:
    task = load(tasks)
    other = task.spec.changed(source=task.spec.source.changed(identity="0" * 64))
    source._scores.clear()
    with pytest.raises(TaskError, match=r"lmms-eval itself \(here version 0.7.3\) is another than when the task was"):
        score_answer(other, task.held_out[0], "blue")


def test_ctrl_c_in_the_terminal_does_not_reach_the_harness(tasks: Path) -> None:
    load(tasks)
    harness = process.open_task("overlapping", str(tasks))
    assert os.getpgid(harness._process.pid) != os.getpgid(0)


def test_an_interrupted_score_is_not_taken_for_the_next_one(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = load(tasks)
    first = next(s for split in SIZES for s in task.split(split) if s.document is not None and s.document.number == 0)
    source._scores.clear()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(process.select, "select", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        score_answer(task.spec, first, "blue")
    assert score_answer(task.spec, first, "triangle") == (7 / 8,)


def test_places_are_relative_to_where_the_command_runs(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tasks.parent.parent)
    monkeypatch.setenv(process.PYTHON_VARIABLE, f"{tasks.parent.name}/replay")
    assert load(tasks).name == "lmms-eval:overlapping"
    with pytest.raises(TaskError, match=r"^lmms-eval task matched: .*/nowhere is no directory$"):
        load_task("lmms-eval:nowhere/matched")


def test_blind_answers_are_scored_by_the_harness(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = load(tasks)
    asked = []
    monkeypatch.setattr(
        process.Harness, "score", lambda self, number, content, answer: asked.append(answer) or {"overlap": 0.25}
    )
    found = chance(task.spec, task.held_out)
    assert found.score == 0.25
    assert set(asked) <= {answer for sample in task.held_out for answer in sample.answers}


def test_answers_are_cut_at_stop_texts_but_not_at_the_blank_line_that_the_harness_adds() -> None:
    assert cut(" a red\nbox \n\nQ: next", ["Q:", "\n\n"]) == "a red\nbox"
    assert cut("\n\nyes\nno", ["\n", ""]) == "yes"
    assert (stops({"until": "x"}), stops({"until": None}), stops({})) == (["x"], [], [])


def test_settings_that_give_other_answers_than_greedy_ones_are_named() -> None:
    for greedy in (
        {},
        {"temperature": 0, "do_sample": False, "num_beams": 1},
        {"temperature": 0.2, "do_sample": False},
    ):
        assert sampling(greedy) == ""
    assert sampling({"temperature": 0.2}) == "temperature: 0.2"
    assert sampling({"do_sample": True, "temperature": 0}) == "do_sample: True"
    assert sampling({"num_beams": 4}) == "num_beams: 4"


def test_a_document_shows_one_image_in_the_colours_that_the_harnesss_models_see() -> None:
    hidden = Image.new("RGBA", (2, 2), (200, 10, 10, 0))
    assert one_image([hidden], 0).getpixel((0, 0)) == (200, 10, 10)
    for visuals, said in (([], "no images"), (None, "no images"), ([hidden] * 2, "2 images"), (["a.mp4"], "a str")):
        with pytest.raises(Refused, match=f"document 3 shows {said}"):
            one_image(visuals, 3)


def test_scores_that_are_asked_of_others_are_found_through_functions_and_imports() -> None:
    import urllib.parse

    def plain(doc: dict[str, str], results: list[str]) -> dict[str, float]:
        return {"score": float(urllib.parse.quote(results[0]) == doc["answer"])}

    def inside(doc: dict[str, str], results: list[str]) -> object:
        import requests

        return requests.post(results[0])

    assert (_judge(plain), _judge(inside), _judge(None)) == ("", "requests", "")
    namespace: dict[str, object] = {}
    exec("import httpx\ndef ask(x): return httpx.get(x)\ndef score(d, r): return [ask(e) for e in r]", namespace)
    assert _judge(namespace["score"]) == "httpx"
    exec(
        "def score(d, r):\n from lmms_eval.verifiers.openai import OpenAIVerifier\n return OpenAIVerifier(r)", namespace
    )
    assert _judge(namespace["score"]) == "lmms_eval.verifiers.openai"
