from __future__ import annotations

import torch

from workers.engines.vllm_plugin.drafting import with_new_places


def test_each_request_has_its_new_places_behind_its_own():
    places = torch.tensor([True, False, True, True, False])  # requests of two, no and three tokens
    assert with_new_places(places, [0, 2, 2, 5], 1).int().tolist() == [1, 0, 0, 0, 1, 1, 0, 0]
