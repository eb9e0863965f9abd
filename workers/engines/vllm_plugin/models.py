"""vLLM's model classes, made to obey the plan in a checkpoint's configuration."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from importlib import import_module
from types import new_class
from typing import Any

from torch import Tensor

from .drafting import let_drafters_see_images
from .layers import FrozenLayer, install
from .plan import read_plan
from .step import Step


class Planned:
    """Apply the plan of a checkpoint's configuration to a model class of vLLM; change nothing where there is none."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        if (speculative := vllm_config.speculative_config) is not None and speculative.uses_draft_model():
            let_drafters_see_images(vllm_config.model_config.hf_config)
        plan = read_plan(vllm_config.model_config.hf_config.to_dict())
        self._skipplan_step: Step | None = None
        self._skipplan_frozen: list[FrozenLayer] = []
        if plan is None:
            return
        step = Step()
        contexts = vllm_config.compilation_config.static_forward_context
        layers = self.get_language_model().model.layers  # type: ignore[attr-defined]
        self._skipplan_frozen = install(layers, plan, contexts, step)
        if any(treatment.splits_tokens for treatment in plan):
            self._skipplan_step = step

    def embed_input_ids(self, input_ids: Tensor, *args: Any, is_multimodal: Tensor | None = None, **kwargs: Any) -> Any:
        """Embed a step's tokens; ``is_multimodal`` says which of them are vision tokens."""
        if self._skipplan_step is not None:
            self._skipplan_step.note(is_multimodal)
        return super().embed_input_ids(input_ids, *args, is_multimodal=is_multimodal, **kwargs)  # type: ignore[misc]

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: object,
    ) -> Any:
        """Run a step under the plan."""
        given = (input_ids, positions, intermediate_tensors, inputs_embeds)
        if self._skipplan_step is None:
            return super().forward(*given, **kwargs)  # type: ignore[misc]
        from vllm.forward_context import get_forward_context

        embedded = inputs_embeds is not None
        with self._skipplan_step.running(
            get_forward_context(), positions.shape[-1], positions.device, embedded=embedded
        ):
            return super().forward(*given, **kwargs)  # type: ignore[misc]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a checkpoint under the names of the hub or of the newest transformers."""
        loaded: set[str] = super().load_weights(_named(weights, self))  # type: ignore[misc]
        for layer in self._skipplan_frozen:
            layer.take_weights()
        return loaded


def _named(weights: Iterable[tuple[str, Tensor]], model: Any) -> Iterator[tuple[str, Tensor]]:
    """Give the tensors of CLIP and SigLIP towers the names that vLLM knows, which newer transformers have shortened."""
    inner = hasattr(getattr(model, "vision_tower", None), "vision_model")
    for name, tensor in weights:
        before, tower, behind = name.partition("vision_tower.")
        if inner and tower and not behind.startswith("vision_model."):
            name = f"{before}{tower}vision_model.{behind}"
        yield name, tensor


@lru_cache
def planned(module: str, name: str) -> Any:
    """Make the class that obeys plans of vLLM's class ``name`` in ``module``."""
    stock = getattr(import_module(module), name)
    return new_class(name, (Planned, stock))


def __getattr__(name: str) -> Any:
    """Find ``architecture@version``, the name under which :mod:`.register` has vLLM import a class from here."""
    from .register import MODULES

    architecture, version, _ = name.partition("@")
    if not version:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return planned(*MODULES[architecture])
