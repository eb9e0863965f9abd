"""Which keys a text row sees, against loops over requests and tokens."""

from __future__ import annotations

import random
from itertools import chain

import pytest
import torch

from workers.engines.vllm_plugin.rows import Rows, VisionSlots, slots_of, text_only, text_runs

BLOCK = 4


def step(seed: int) -> tuple[list[list[bool]], list[int]]:
    """Requests as masks of vision tokens, and how many of each were computed in earlier steps."""
    draw = random.Random(seed)
    requests = []
    for _ in range(draw.randint(1, 4)):
        mask: list[bool] = []
        for _ in range(draw.randint(1, 4)):
            mask += [False] * draw.randint(0, 3) + [True] * draw.randint(0, 5)
        requests.append([*mask, draw.random() < 0.5])
    return requests, [draw.randrange(len(mask)) for mask in requests]


def as_tensors(requests: list[list[bool]], computed: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    new = [mask[done:] for mask, done in zip(requests, computed, strict=True)]
    start = torch.tensor([0, *map(len, new)]).cumsum(0).int()
    return torch.tensor(list(chain(*new))), start, torch.tensor([len(mask) for mask in requests]).int()


def new_text(requests: list[list[bool]], computed: list[int]) -> list[tuple[int, int]]:
    """Request and position of the text tokens of a step, in the order of its rows."""
    return [
        (number, position)
        for number, (mask, done) in enumerate(zip(requests, computed, strict=True))
        for position in range(done, len(mask))
        if not mask[position]
    ]


def seen(queries: object, rows: int) -> list[tuple[int, int]]:
    """Request and number of keys of each row, as a kernel reads them: sequences end with their last query."""
    start, lengths, request = queries.query_start.tolist(), queries.seq_lens.tolist(), queries.request.tolist()
    found = []
    for number, length in enumerate(lengths):
        queried = start[number + 1] - start[number]
        assert queried > 0
        found += [(request[number], length - queried + row + 1) for row in range(queried)]
    assert len(found) == rows == start[-1]
    return found


@pytest.mark.parametrize("seed", range(40))
def test_a_text_row_of_a_frozen_layer_sees_all_tokens_up_to_itself(seed: int):
    requests, computed = step(seed)
    expected = [(request, position + 1) for request, position in new_text(requests, computed)]
    if expected:
        queries = text_runs(*as_tensors(requests, computed))
        assert seen(queries, len(expected)) == expected
        assert queries.query_start.dtype == queries.seq_lens.dtype == torch.int32


@pytest.mark.parametrize("seed", range(40))
def test_a_text_row_of_a_bypassed_layer_sees_the_text_up_to_itself(seed: int):
    requests, computed = step(seed)
    text = new_text(requests, computed)
    expected = [(request, requests[request][: position + 1].count(False)) for request, position in text]
    if expected:
        vision, start, _ = as_tensors(requests, computed)
        before = torch.tensor([mask[:done].count(False) for mask, done in zip(requests, computed, strict=True)])
        queries, places = text_only(vision, start, before)
        assert seen(queries, len(expected)) == expected
        assert places.tolist() == [keys - 1 for _, keys in expected]


@pytest.mark.parametrize("seed", range(20))
def test_slots_remember_vision_tokens_of_earlier_steps_and_of_their_present_owner(seed: int):
    requests, computed = step(seed)
    draw = torch.Generator().manual_seed(seed)
    blocks = torch.randperm(40, generator=draw)[: len(requests) * 8].view(len(requests), 8)
    slots = VisionSlots()
    slots.write(torch.arange(40 * BLOCK), torch.rand(40 * BLOCK, generator=draw) < 0.5)  # what former owners left
    for number, mask in enumerate(requests):
        slots.write(slots_of(torch.arange(len(mask)), blocks[number], BLOCK), torch.tensor(mask))
    counted = slots.text_among(torch.tensor(computed), blocks, BLOCK)
    assert counted.tolist() == [mask[:done].count(False) for mask, done in zip(requests, computed, strict=True)]


def test_a_slot_is_its_block_and_its_place_in_it():
    assert slots_of(torch.tensor([0, 3, 4, 9]), torch.tensor([7, 2, 5]), BLOCK).tolist() == [28, 31, 8, 21]
    tables = torch.tensor([[7, 2], [1, 0]])
    assert slots_of(torch.tensor([4, 2]), tables, BLOCK).tolist() == [8, 6]


def test_padding_behind_the_tokens_is_not_vision():
    rows = Rows.of(torch.tensor([True, False, True]), 5, torch.device("cpu"))
    assert rows.vision.tolist() == [0, 2] and rows.text.tolist() == [1, 3, 4]
