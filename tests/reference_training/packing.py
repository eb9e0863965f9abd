"""Packed sequences: all questions of an image after one image prefix, so the image is read once for all of them.

Each question is a branch. A branch attends to the prefix and to itself, never to another branch, and its positions
start where the prefix ends, so every branch sees exactly what it would see alone after the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.nn import functional
from transformers import LlavaForConditionalGeneration, LlavaProcessor

_PLACEHOLDER = "describe the image"


@dataclass(frozen=True)
class Branch:
    """A question and its answer as tokens that follow the image prefix; the last `answer_length` are the answer."""

    tokens: tuple[int, ...]
    answer_length: int


@dataclass(frozen=True)
class PackedBatch:
    """Packed sequences, one row for each image.

    tokens, positions: `[images, tokens]`. mask: `[images, 1, tokens, tokens]`, 0 where a row's token may look and a
    large negative number elsewhere. targets: `[images, tokens]`, the next token where that is part of an answer, -100
    elsewhere; question_targets: the same for the questions, each from its second token on.
    branches: `[images, tokens]`, the branch number of a token, -1 in the prefix and the padding.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    targets: torch.Tensor
    question_targets: torch.Tensor
    branches: torch.Tensor


class Packer:
    """Turns questions and answers into the tokens that the processor's chat template gives at inference."""

    def __init__(self, processor: LlavaProcessor, image_tokens: int) -> None:
        self._tokenizer = processor.tokenizer
        self._processor = processor
        self._image_tokens = image_tokens
        self.pad = int(self._tokenizer.pad_token_id)
        self.end = int(self._tokenizer.eos_token_id)
        self.prefix = self._prompt(_PLACEHOLDER)[: self._prefix_length()]
        self.branch = lru_cache(maxsize=100_000)(self._branch)

    def _prompt(self, question: str) -> tuple[int, ...]:
        """Tokens of the whole prompt, the image written out as its placeholder tokens."""
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = self._processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        text = text.replace(self._processor.image_token, self._processor.image_token * self._image_tokens)
        return tuple(self._tokenizer(text)["input_ids"])

    def _prefix_length(self) -> int:
        """Everything up to the line break after the image is the same for all questions."""
        tokens = self._prompt(_PLACEHOLDER)
        last_image = len(tokens) - 1 - tokens[::-1].index(self._processor.image_token_id)
        return last_image + 2

    def _branch(self, question: str, answer: str) -> Branch:
        """Tokens of one question and answer after the prefix.

        Raises:
            ValueError: if the question changes the tokens of the prefix.
        """
        prompt = self._prompt(question)
        if prompt[: len(self.prefix)] != self.prefix:
            raise ValueError(f"question {question!r} does not tokenize apart from the image prefix")
        answer_tokens = (*self._tokenizer(f" {answer}", add_special_tokens=False)["input_ids"], self.end)
        return Branch((*prompt[len(self.prefix) :], *answer_tokens), len(answer_tokens))

    def pack(self, rows: Sequence[Sequence[Branch]], dtype: torch.dtype) -> PackedBatch:
        """Pack the branches of each image into one row; shorter rows are padded at the end."""
        start = len(self.prefix)
        length = start + max(sum(len(branch.tokens) for branch in row) for row in rows)
        tokens = torch.full((len(rows), length), self.pad)
        positions = torch.zeros((len(rows), length), dtype=torch.long)
        targets = torch.full((len(rows), length), -100)
        question_targets = torch.full((len(rows), length), -100)
        branches = torch.full((len(rows), length), -2)
        tokens[:, :start] = torch.tensor(self.prefix)
        positions[:, :start] = torch.arange(start)
        branches[:, :start] = -1
        for number, row in enumerate(rows):
            at = start
            for which, branch in enumerate(row):
                end, first_answer = at + len(branch.tokens), at + len(branch.tokens) - branch.answer_length
                tokens[number, at:end] = torch.tensor(branch.tokens)
                positions[number, at:end] = torch.arange(start, start + len(branch.tokens))
                branches[number, at:end] = which
                targets[number, first_answer - 1 : end - 1] = tokens[number, first_answer:end]
                question_targets[number, at : first_answer - 1] = tokens[number, at + 1 : first_answer]
                at = end
        # Padding keeps its own number: it may look at other padding, so that no row of the mask is empty.
        same = branches[:, :, None] == branches[:, None, :]
        to_prefix = (branches == -1)[:, None, :]
        seen = (same | to_prefix) & torch.ones(length, length, dtype=torch.bool).tril()
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)
        branches = branches.masked_fill(branches == -2, -1)
        return PackedBatch(tokens, positions, mask[:, None], targets, question_targets, branches)


def _states(model: LlavaForConditionalGeneration, batch: PackedBatch, pixels: torch.Tensor) -> torch.Tensor:
    """Last hidden states `[images, tokens, hidden]`; pixels are `[images, 3, height, width]` in the model's dtype."""
    states: torch.Tensor = model.model(
        input_ids=batch.tokens,
        pixel_values=pixels,
        attention_mask=batch.mask,
        position_ids=batch.positions,
        use_cache=False,
    ).last_hidden_state
    return states


def answer_scores(
    model: LlavaForConditionalGeneration, batch: PackedBatch, pixels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores `[answer tokens, vocabulary]` and targets `[answer tokens]` of all answers of a batch."""
    counted = batch.targets >= 0
    return model.lm_head(_states(model, batch, pixels)[counted]).float(), batch.targets[counted]


def packed_losses(
    model: LlavaForConditionalGeneration, batch: PackedBatch, pixels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross-entropy of the answer tokens, the end token included, and of the question tokens."""
    states = _states(model, batch, pixels)
    answers, questions = (
        functional.cross_entropy(model.lm_head(states[targets >= 0]).float(), targets[targets >= 0])
        for targets in (batch.targets, batch.question_targets)
    )
    return answers, questions


@torch.no_grad()
def answers_right(model: LlavaForConditionalGeneration, batch: PackedBatch, pixels: torch.Tensor) -> tuple[int, int]:
    """How many answers greedy decoding would give exactly, and how many there are.

    An answer is decoded exactly when the teacher-forced best token is the right one at all of its positions.
    """
    scores, targets = answer_scores(model, batch, pixels)
    counted = batch.targets >= 0
    rows = torch.nonzero(counted)[:, 0].tolist()
    answers = list(zip(rows, batch.branches[counted].tolist(), strict=True))
    hits = (scores.argmax(-1) == targets).tolist()
    wrong = {answer for answer, hit in zip(answers, hits, strict=True) if not hit}
    total = len(set(answers))
    return total - len(wrong), total
