"""A multiple-choice task made from another one's images, and its options scored by hand, one at a time."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workers.models.loading import LoadedModel
from workers.tasks import Sample, Task
from workers.tasks.spec import Answer

WORDS = ("red", "green", "a blue triangle", "circle", "yes", "no", "a rectangle that is brown", "teal", "yes, it is")


def as_choices(task: Task, *, seed: int = 0, metric: str = "multiple_choice") -> Task:
    """Every sample with two to five options; the right one is its own answer where that is among them."""
    generator = random.Random(seed)

    def changed(sample: Sample) -> Sample:
        options = list(dict.fromkeys([sample.answers[0], *generator.sample(WORDS, 4)]))[: generator.randint(2, 5)]
        generator.shuffle(options)
        return replace(sample, choices=tuple(options))

    spec = task.spec.changed(
        answer=Answer(kind="choice", max_new_tokens=4, options="texts"),
        metric=metric,
        secondary=("multiple_choice_per_byte",),
    )
    return replace(
        task,
        spec=spec,
        calibration=tuple(map(changed, task.calibration)),
        search=tuple(map(changed, task.search)),
        held_out=tuple(map(changed, task.held_out)),
    )


def log_likelihood_by_hand(model: Any, loaded: LoadedModel, sample: Sample, option: str, separator: str = " ") -> float:
    """What a user would do: one forward call over prompt and option, no padding, no batch, and a sum over tokens."""
    processor = loaded.processor
    content = [{"type": "image", "image": sample.image.open()}, {"type": "text", "text": sample.question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    own = processor.tokenizer(separator + option, add_special_tokens=False, return_tensors="pt")["input_ids"]
    prompt = inputs["input_ids"].shape[1]
    ids = torch.cat((inputs["input_ids"], own), dim=1)
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs = {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    with torch.no_grad():
        logits: Tensor = model(**inputs).logits[0].float()
    expected = 0.0
    for step, token in enumerate(own[0].tolist()):
        row = logits[prompt - 1 + step].double().numpy()
        shifted = row - row.max()
        expected += float(shifted[token] - np.log(np.exp(shifted).sum()))
    return expected
