"""Let vLLM's draft models see the images of a request.

vLLM 0.32 shares the target's image features with a draft model, as it does with EAGLE heads, whose tokens are shifted
by one; a draft model's are not, and each request has one more, the token sampled last. The mask that says where
features go then fits neither the places nor the number of the tokens, and the first request with an image fails.
"""

from __future__ import annotations

from functools import wraps
from itertools import pairwise
from typing import Any

from torch import Tensor, cat


def let_drafters_see_images(config: Any) -> None:
    """Have this process place image features where a draft model's tokens are.

    ``config`` is the served model's, of which vLLM reads the placeholder by a name that not every family has.
    """
    if not hasattr(config, "image_token_index"):
        config.image_token_index = getattr(config, "image_token_id", None)
    from vllm.v1.spec_decode.draft_model import DraftModelProposer
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    gather, propose = GPUModelRunner._gather_mm_embeddings, DraftModelProposer.propose
    if hasattr(propose, "__wrapped__"):  # done already
        return

    @wraps(gather)
    def gather_in_place(self: Any, scheduler_output: Any, shift_computed_tokens: int = 0) -> Any:
        drafts = isinstance(getattr(self, "drafter", None), DraftModelProposer)
        return gather(self, scheduler_output, 0 if drafts else shift_computed_tokens)

    @wraps(propose)
    def propose_with_images(self: Any, *args: Any, mm_embed_inputs: Any = None, **kwargs: Any) -> Any:
        if mm_embed_inputs is not None:
            features, places = mm_embed_inputs
            starts = kwargs["common_attn_metadata"].query_start_loc_cpu.tolist()
            mm_embed_inputs = features, with_new_places(places, starts, self.net_num_new_slots_per_request)
        return propose(self, *args, mm_embed_inputs=mm_embed_inputs, **kwargs)

    GPUModelRunner._gather_mm_embeddings = gather_in_place
    DraftModelProposer.propose = propose_with_images


def with_new_places(places: Tensor, starts: list[int], new: int) -> Tensor:
    """Add ``new`` places without features behind those of each request.

    ``places`` ``[tokens]`` is true where an image's features go; request ``i`` has those from ``starts[i]`` to
    ``starts[i + 1]``.
    """
    return cat([part for start, end in pairwise(starts) for part in (places[start:end], places.new_zeros(new))])
