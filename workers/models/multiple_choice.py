"""Choose the option that is likeliest behind the prompt, as the Language Model Evaluation Harness does.

The plain path feeds every option by ``generate``, whose choice of tokens is overruled: the model is entered as for any
generated answer, whatever its family, and its logits are read before generation settings could change them. An
option's score is the sum of its tokens' log-probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import ProcessorMixin

from workers.errors import TaskError
from workers.tasks import Sample, Task, TaskSpec
from workers.tasks.metrics import CHOICE_METRICS

from .forced import force
from .inputs import PreparedBatch, prepare_batch
from .loading import LoadedModel
from .prompts import rendered, to_device
from .ties import tie_bound

NAN_LOGITS = "the logits hold NaN"
"""Why a sample fails whose answer cannot be read."""


@dataclass(frozen=True)
class Likelihood:
    """An option's log-likelihood in nats, and how far rounding may have moved it, in nats.

    The rounding of one token's logits has nothing to do with the next one's, so squares add up.
    """

    total: float
    noise: float

    def __add__(self, other: Likelihood) -> Likelihood:
        return Likelihood(self.total + other.total, math.hypot(self.noise, other.noise))


def token_likelihoods(logits: Tensor, tokens: Sequence[int], dtype: torch.dtype) -> list[Likelihood]:
    """Return the likelihood of one token per row of float32 logits ``[tokens, vocabulary]`` of a model in ``dtype``.

    NaN anywhere in a row makes its ``total`` NaN.
    """
    chosen = logits.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0]
    totals = chosen - logits.logsumexp(-1)
    noise = tie_bound(torch.maximum(logits.amax(-1), chosen.abs()), dtype)
    return [Likelihood(*pair) for pair in zip(totals.tolist(), noise.tolist(), strict=True)]


def option_tokens(processor: ProcessorMixin, spec: TaskSpec, sample: Sample) -> tuple[tuple[int, ...], ...]:
    """Return the tokens of each option behind the sample's prompt.

    They are what the text of prompt and option has more than the prompt's, so that an option is spelled as it would be
    in running text; by themselves where the prompt's last token would change.

    Raises:
        TaskError: an option has no tokens.
    """
    prompt = rendered(processor, spec, sample)
    separator = spec.answer.separator
    if separator is None:
        separator = "" if prompt[-1:].isspace() else " "

    def encode(text: str) -> list[int]:
        return list(processor.tokenizer(text, add_special_tokens=False)["input_ids"])

    before = encode(prompt)
    found = []
    for option in sample.choices:
        whole = encode(prompt + separator + option)
        joined = whole[: len(before)] == before
        tokens = whole[len(before) :] if joined else encode(separator + option)
        if not tokens:
            raise TaskError(f"sample {sample.id}: the option {option!r} has no tokens")
        found.append(tuple(tokens))
    return tuple(found)


def one_by_one(samples: Sequence[Sample]) -> list[Sample]:
    """Make each option a sample of its own, whose only option it is."""
    return [
        replace(sample, id=_option_id(sample, number), choices=(option,))
        for sample in samples
        for number, option in enumerate(sample.choices)
    ]


def option_likelihoods(
    loaded: LoadedModel, task: Task, batch: PreparedBatch
) -> tuple[dict[str, Likelihood], dict[str, str]]:
    """Return the log-likelihoods of single options (:func:`one_by_one`) by id, and why others have none.

    They hold for the plan that is applied to the model.
    """
    assert batch.inputs is not None
    tokens, failed = [], {}
    for sample in batch.samples:
        try:
            tokens.append(option_tokens(loaded.processor, task.spec, sample)[0])
        except TaskError as error:
            failed[sample.id] = str(error)
            tokens.append(())
    inputs = to_device(batch.inputs, loaded.device, loaded.model.dtype)
    likelihoods = feed(loaded.model, inputs, tokens, loaded.processor.tokenizer.pad_token_id)
    found = {}
    for sample, own, likelihood in zip(batch.samples, tokens, likelihoods, strict=True):
        if math.isnan(likelihood.total):
            failed[sample.id] = NAN_LOGITS
        elif own:
            found[sample.id] = likelihood
    return found, failed


def feed(model: Any, inputs: Mapping[str, Any], tokens: Sequence[Sequence[int]], pad: int) -> list[Likelihood]:
    """Return the likelihood of each row's own tokens behind the prompts in ``inputs``, which ``generate`` takes."""
    found = [Likelihood(0.0, 0.0)] * len(tokens)

    def read(step: int, following: list[int], logits: Tensor, scores: Tensor) -> None:
        for row, likelihood in enumerate(token_likelihoods(logits, following, model.dtype)):
            if step < len(tokens[row]):
                found[row] += likelihood

    force(model, inputs, tokens, pad, read)
    return found


@dataclass(frozen=True)
class Choice:
    """The option that is worth most under a metric, and the others that may be worth as much but for rounding."""

    option: str
    tied: tuple[str, ...]

    @classmethod
    def of(cls, metric: str, options: Sequence[str], likelihoods: Sequence[Likelihood]) -> Choice:
        """Take the option that is worth most, the first of equals."""
        worth = CHOICE_METRICS[metric]
        values = [worth(each.total, option) for each, option in zip(likelihoods, options, strict=True)]
        noise = [worth(each.noise, option) for each, option in zip(likelihoods, options, strict=True)]
        best = max(range(len(values)), key=lambda number: (values[number], -number))
        tied = tuple(
            option
            for number, option in enumerate(options)
            if number != best and values[best] - values[number] <= math.hypot(noise[best], noise[number])
        )
        return cls(options[best], tied)

    def score(self, sample: Sample) -> float:
        """1 where the right option was chosen."""
        return float(self.option in sample.answers)

    def is_open(self, sample: Sample) -> bool:
        """Whether a tie could change the score."""
        return any((option in sample.answers) != (self.option in sample.answers) for option in self.tied)


def chosen_tokens(loaded: LoadedModel, task: Task, sample: Sample) -> tuple[tuple[int, ...], str]:
    """Return the tokens of the option that the model chooses by itself; none, and why, where it can choose none."""
    batch = prepare_batch(loaded, task, one_by_one([sample]))
    if batch.inputs is None:
        return (), next(iter(batch.failed.values()))
    found, failed = join([sample], *option_likelihoods(loaded, task, batch))
    if sample.id not in found:
        return (), failed[sample.id]
    choice = Choice.of(task.spec.metric, sample.choices, found[sample.id])
    return option_tokens(loaded.processor, task.spec, sample)[sample.choices.index(choice.option)], ""


def join(
    samples: Sequence[Sample], likelihoods: Mapping[str, Likelihood], failed: Mapping[str, str]
) -> tuple[dict[str, tuple[Likelihood, ...]], dict[str, str]]:
    """Gather single options' likelihoods and failures by sample; an option that fails fails its sample."""
    found: dict[str, tuple[Likelihood, ...]] = {}
    reasons: dict[str, str] = {}
    for sample in samples:
        ids = [_option_id(sample, number) for number in range(len(sample.choices))]
        reason = next((failed[each] for each in ids if each in failed), None)
        if reason is None:
            found[sample.id] = tuple(likelihoods[each] for each in ids)
        else:
            reasons[sample.id] = reason
    return found, reasons


def _option_id(sample: Sample, number: int) -> str:
    return f"{sample.id}, option {number + 1}"
