"""Load the drafter beside this file for transformers' assisted generation; needs torch and transformers alone."""

from __future__ import annotations

from functools import wraps
from pathlib import Path
from typing import Any

from transformers import AutoModelForImageTextToText


def load_drafter(directory: str | Path = Path(__file__).parent, **options: Any) -> Any:
    """Load the drafter, ready as ``assistant_model`` of the dense model's ``generate``.

    ``options`` are those of ``from_pretrained``. transformers never treats an assistant's pass over the prompt as the
    first of its request, and models take images in that one alone: without the change made here, drafts are made
    without the images, and most are refused.
    """
    drafter = AutoModelForImageTextToText.from_pretrained(directory, **options).eval()
    prepare = drafter.prepare_inputs_for_generation

    @wraps(prepare)
    def prepare_with_images(*args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("cache", kwargs.get("past_key_values"))  # by its name in newer and older releases
        first = cache is None or cache.get_seq_length() == 0
        return prepare(*args, **kwargs | {"is_first_iteration": first})

    drafter.prepare_inputs_for_generation = prepare_with_images
    return drafter
