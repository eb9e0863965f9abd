"""Measure a checkpoint with plain `generate`: `python -m reference_training.evaluate --model DIRECTORY`.

Nothing here knows how the model was trained: it loads with the Auto classes, asks through the processor's chat template
and compares the decoded text. easy-VQA is measured on the package's test images, scenes and rendered texts on
evaluation indices.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from reference_training.data import easy_vqa_images
from workers.tasks.rendered import PROMPT, is_reserved, rendered_text
from workers.tasks.scenes import FIRST_EVALUATION_INDEX, QUESTIONS, scene

_NORMAL_QUANTILE = 1.959963984540054
_BATCH = 64


@dataclass(frozen=True)
class Question:
    """One question on one image and the answer expected."""

    image: Image.Image
    question: str
    answer: str


@dataclass(frozen=True)
class Accuracy:
    """Exact matches among n answers, with the 95 % Wilson score interval of the share."""

    right: int
    n: int

    @property
    def share(self) -> float:
        """Share of the answers that match exactly."""
        return self.right / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson score interval (Wilson 1927)."""
        z, n, share = _NORMAL_QUANTILE, self.n, self.share
        middle = (share + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
        return middle - half, middle + half


def easy_vqa_questions(limit: int | None = None) -> Iterator[Question]:
    """Every question of the easy-VQA test images, or of the first `limit` images."""
    for entry in easy_vqa_images("test")[:limit]:
        with Image.open(entry.path) as opened:
            image = opened.convert("RGB")
        for question, answer in zip(entry.questions, entry.answers, strict=True):
            yield Question(image, question, answer)


def scene_questions(
    count: int, seed: int, first: int = FIRST_EVALUATION_INDEX, question: str = "caption"
) -> Iterator[Question]:
    """One of the questions about `count` scenes, from index `first` on."""
    asked = QUESTIONS[question]
    for index in range(first, first + count):
        drawn = scene(index, seed)
        yield Question(drawn.image, asked.prompt, asked.answer(drawn))


def text_questions(count: int, seed: int, *, reserved: bool = False) -> Iterator[Question]:
    """`count` rendered texts; `reserved`: those among them that show a number never drawn for training."""
    for index in range(FIRST_EVALUATION_INDEX, FIRST_EVALUATION_INDEX + count):
        drawn = rendered_text(index, seed)
        if not reserved or (drawn.text.isdigit() and is_reserved(int(drawn.text))):
            yield Question(drawn.image, PROMPT, drawn.text)


@torch.inference_mode()
def answers(model: Any, processor: Any, questions: list[Question]) -> list[str]:
    """Greedy answers to a batch of questions, as text."""
    prompts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": asked.question}]}],
            add_generation_prompt=True,
        )
        for asked in questions
    ]
    images = [asked.image for asked in questions]
    inputs = processor(images=images, text=prompts, padding=True, return_tensors="pt").to(model.device, model.dtype)
    generated = model.generate(**inputs, do_sample=False, max_new_tokens=72)
    texts = processor.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def measure(model: Any, processor: Any, questions: Iterator[Question]) -> Accuracy:
    """Ask everything and count the exact matches.

    Raises:
        ValueError: if there are no questions.
    """
    everything = list(questions)
    if not everything:
        raise ValueError("there is nothing to measure: no questions")
    right = 0
    for start in range(0, len(everything), _BATCH):
        batch = everything[start : start + _BATCH]
        given = answers(model, processor, batch)
        right += sum(text == asked.answer for text, asked in zip(given, batch, strict=True))
    return Accuracy(right, len(everything))


def main(argv: list[str] | None = None) -> int:
    """Measure the tasks and print one JSON line for each."""
    parser = argparse.ArgumentParser(prog="python -m reference_training.evaluate", description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("configs/reference/llava-12"))
    parser.add_argument("--images", type=int, default=None, help="easy-VQA test images (default: all)")
    parser.add_argument("--scenes", type=int, default=2000, help="number of scenes; 0 leaves them out")
    parser.add_argument("--questions", nargs="+", choices=list(QUESTIONS), default=["caption"], help="about each scene")
    parser.add_argument("--texts", type=int, default=0, help="number of rendered texts; 0 leaves them out")
    parser.add_argument("--seed", type=int, default=0, help="seed of scenes and texts")
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args(argv)
    if not (options.model / "config.json").is_file():
        print(f"{options.model}: no config.json there; --model must be a checkpoint directory", file=sys.stderr)
        return 2
    if options.threads:
        torch.set_num_threads(options.threads)
    model = AutoModelForImageTextToText.from_pretrained(options.model, dtype=torch.bfloat16).eval()
    processor = AutoProcessor.from_pretrained(options.model)
    tasks = {
        "easy-vqa": easy_vqa_questions(options.images),
    }
    if options.scenes:
        for question in options.questions:
            tasks[f"scenes, {question}"] = scene_questions(options.scenes, options.seed, question=question)
    if options.texts:
        tasks["texts"] = text_questions(options.texts, options.seed)
        tasks["texts, reserved numbers"] = text_questions(options.texts, options.seed, reserved=True)
    for name, questions in tasks.items():
        started = time.perf_counter()
        result = measure(model, processor, questions)
        row = {"task": name, **asdict(result), "exact_match": result.share, "wilson_95": result.interval}
        print(json.dumps({**row, "seconds": round(time.perf_counter() - started, 1)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
