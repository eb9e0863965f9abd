"""The measurements again, the slow way: one unpadded prompt at a time, whole forward passes, float64 numpy."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from transformers import LlavaForConditionalGeneration

from workers.models.loading import LoadedModel
from workers.models.prompts import build_inputs
from workers.runtime import SkipPlan, apply
from workers.tasks import Sample, Task


@dataclass(frozen=True)
class Prompt:
    """What one prompt's forward pass gave: states after 0, 1, ... layers ``[depth][tokens, hidden]``, and the rest."""

    states: np.ndarray
    vision: np.ndarray
    attentions: np.ndarray
    """``[layers, heads, queries, keys]``"""
    logits: np.ndarray
    """``[1 + answer tokens, vocabulary]``"""
    answer_tokens: int = 0

    @property
    def groups(self) -> dict[str, np.ndarray]:
        last, behind = np.zeros_like(self.vision), np.zeros_like(self.vision)
        last[len(last) - self.answer_tokens - 1] = True
        behind[len(last) - self.answer_tokens :] = True
        prompt = {"vision": self.vision, "text": ~self.vision & ~behind, "all": ~behind}
        return prompt | {"last": last, "answer": last | behind}


def eager_copy(loaded: LoadedModel) -> LlavaForConditionalGeneration:
    model = LlavaForConditionalGeneration(deepcopy(loaded.model.config))
    model.load_state_dict(loaded.model.state_dict())
    model.set_attn_implementation("eager")
    return model.eval()


def greedy(model, loaded: LoadedModel, task: Task, sample: Sample) -> list[int]:
    """The answer's tokens without the one that ends it (or is the last that may be), one whole pass for each."""
    fed: list[int] = []
    with torch.no_grad():
        for _ in range(task.spec.answer.max_new_tokens - 1):
            token = int(model(**_inputs(loaded, task, sample, fed)).logits[0, -1].argmax())
            if token == model.generation_config.eos_token_id:
                break
            fed.append(token)
    return fed


def _inputs(loaded: LoadedModel, task: Task, sample: Sample, answer: list[int]):
    inputs = build_inputs(loaded.processor, task.spec, [sample], [sample.image.open()])
    for name, values in (("input_ids", answer), ("attention_mask", [1] * len(answer))):
        inputs[name] = torch.cat([inputs[name], torch.tensor([values], dtype=torch.long)], dim=1)
    return inputs


def forward(
    model, loaded: LoadedModel, task: Task, sample: Sample, plan: str | None = None, answer: list[int] | None = None
) -> Prompt:
    """A prompt alone, with an answer behind it; the last state is taken before the norm, unlike transformers' own."""
    answer = answer or []
    inputs = _inputs(loaded, task, sample, answer)
    last: list[torch.Tensor] = []
    language = model.model.language_model
    handle = language.norm.register_forward_pre_hook(lambda _, args: last.append(args[0]))
    eager = language.config._attn_implementation == "eager"
    with torch.no_grad(), apply(model, SkipPlan.parse(plan or "R" * len(language.layers))):
        output = model(**inputs, output_hidden_states=plan is None, output_attentions=eager)
    handle.remove()
    depths = [*output.hidden_states[:-1], last[0]] if plan is None else [last[0]]
    vision = inputs["input_ids"][0].numpy() == loaded.processor.image_token_id
    maps = [each[0].double().numpy() for each in output.attentions] if eager else []
    return Prompt(
        np.stack([state[0].double().numpy() for state in depths]),
        vision,
        np.stack(maps) if maps else np.zeros(0),
        output.logits[0, -1 - len(answer) :].double().numpy(),
        len(answer),
    )


def prompts(loaded: LoadedModel, task: Task, model=None) -> list[Prompt]:
    return [forward(model or loaded.model, loaded, task, sample) for sample in task.calibration]


def distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return 1 - (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)


def ratio(samples: list[np.ndarray]) -> tuple[float, float]:
    """Mean over all values and its standard error with samples as units (Cochran 1977, section 6.4)."""
    values = np.concatenate(samples)
    residuals = np.array([(each - values.mean()).sum() for each in samples])
    count = len(samples)
    return float(values.mean()), float(np.sqrt((residuals**2).sum() * count / (count - 1)) / len(values))


def kl(dense: np.ndarray, changed: np.ndarray) -> np.ndarray:
    """Per token, of logits ``[tokens, vocabulary]``."""
    p, q = (np.exp(x - x.max(-1, keepdims=True)) for x in (dense, changed))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    return (p * (np.log(p) - np.log(q))).sum(-1)


def hsic(k: np.ndarray, m: np.ndarray) -> float:
    """Song et al. 2012: the U-statistic itself, over all distinct indices."""
    n = len(k)
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    first = sum(k[i, j] * m[i, j] for i, j in pairs) / (n * (n - 1))
    third = sum(k[i, j] * m[i, q] for i, j in pairs for q in range(n) if q not in (i, j)) / (n * (n - 1) * (n - 2))
    second = sum(k[i, j] * m[q, r] for i, j in pairs for q, r in pairs if len({i, j, q, r}) == 4) / (
        n * (n - 1) * (n - 2) * (n - 3)
    )
    return float(first + second - 2 * third)
