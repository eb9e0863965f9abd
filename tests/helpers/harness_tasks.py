"""YAML tasks of lmms-eval with local data: questions of easy-vqa, one an image, and tasks that cannot be taken over."""

from __future__ import annotations

import json
from pathlib import Path

import easy_vqa

COMMON = """\
dataset_path: json
dataset_kwargs:
  data_files:
    test: questions.jsonl
test_split: test
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 6
  do_sample: false
"""

SCORED = """\
include: common
metric_list:
  - metric: {metric}
    aggregation: mean
    higher_is_better: true
"""

YAML = {
    # The harness's own metrics; the second one gives parts of a point.
    "matched": SCORED.format(metric="exact_match")
    + """\
    ignore_case: true
  - metric: anls
    aggregation: mean
    higher_is_better: true
""",
    # A task's own scores, a prompt of ours, a filter, and a text that ends answers.
    "overlapping": SCORED.format(metric="overlap")
    + """\
  - metric: letters
    aggregation: !function utils.all_letters
    higher_is_better: true
process_results: !function utils.overlapping
filter_list:
  - name: lower
    filter:
      - function: lowercase
      - function: take_first
generation_kwargs:
  max_new_tokens: 6
  until: ["e"]
lmms_eval_specific_kwargs:
  default:
    before: ""
  skipplan:
    before: "Look. "
""",
    "corpus": "include: common\nmetric_list:\n  - metric: letters\n    aggregation: !function utils.all_letters\n"
    "    higher_is_better: true\nprocess_results: !function utils.overlapping\n",
    "worse": SCORED.format(metric="overlap").replace("true", "false")
    + "process_results: !function utils.overlapping\n",
    "beyond": SCORED.format(metric="points") + "process_results: !function utils.points\n",
    "judged": SCORED.format(metric="overlap") + "process_results: !function utils.judged\n",
    "sampled": SCORED.format(metric="exact_match") + "generation_kwargs: {temperature: 0.7, max_new_tokens: 6}\n",
    "pair": SCORED.format(metric="exact_match") + "doc_to_visual: !function utils.pair\n",
    "chosen": SCORED.format(metric="acc").replace("include: common", "include: common\noutput_type: multiple_choice\n")
    + "doc_to_choice: ['yes', 'no']\ngeneration_kwargs: null\n",
}

UTILS = """\
from PIL import Image

from lmms_eval.llm_judge import get_server


def visual(doc):
    return [Image.open(doc["image"])]


def pair(doc):
    return visual(doc) * 2


def text(doc, specific=None):
    return (specific or {}).get("before", "") + doc["question"]


def overlapping(doc, results):
    said, right = set(results[0]), set(doc["answer"])
    return {"overlap": len(said & right) / len(said | right), "letters": results[0]}


def points(doc, results):
    return {"points": 100.0 * (results[0] == doc["answer"])}


def judged(doc, results):
    return {"overlap": ask(results[0])}


def ask(answer):
    return get_server("openai").evaluate(answer)


def all_letters(results):
    return len(set("".join(results)))
"""


def write(directory: Path, count: int) -> list[dict[str, str]]:
    """Write the tasks and return their documents, about so many images."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "common").write_text(COMMON, encoding="utf-8")
    (directory / "utils.py").write_text(UTILS, encoding="utf-8")
    for name, content in YAML.items():
        (directory / f"{name}.yaml").write_text(f"task: {name}\n{content}", encoding="utf-8")
    documents = questions(count)
    lines = "".join(json.dumps(each) + "\n" for each in documents)
    (directory / "questions.jsonl").write_text(lines, encoding="utf-8")
    return documents


def questions(count: int) -> list[dict[str, str]]:
    """One question of easy-vqa about each of the first test images."""
    paths = easy_vqa.get_test_image_paths()
    found: dict[int, dict[str, str]] = {}
    asked = list(zip(*easy_vqa.get_test_questions(), strict=True))
    for question, answer, image in asked[:: len(asked) // 900]:
        found.setdefault(image, {"image": str(paths[image]), "question": question, "answer": answer})
    return list(found.values())[:count]
