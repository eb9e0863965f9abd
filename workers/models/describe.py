"""Describe a model by its configuration and its processor: no weights are read, nothing is allocated."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoModelForImageTextToText

from workers.errors import ModelError
from workers.messages import ModelSource
from workers.runtime.descriptor import UnsupportedFamilyError
from workers.runtime.families import describe
from workers.runtime.plan import Action
from workers.text import one_line

from .checkpoint import BUILT_MODELS, bundled_models, find_checkpoint
from .loading import load_config
from .processors import load_processor


@dataclass(frozen=True)
class ModelDescription:
    """A model's family, its number of decoder layers and parameters, and what each layer may do."""

    family: str
    num_layers: int
    parameters: int
    refusals: dict[str, dict[int, str]]
    """By action (``"skip"``), the layers that may not take it and why; an action that all may take has no entry."""

    def layers_for(self, action: str) -> int:
        """Count the layers that may take an action."""
        return self.num_layers - len(self.refusals.get(action, {}))


def describe_model(source: ModelSource) -> ModelDescription:
    """Build the model on torch's meta device from its configuration and describe it; load its processor as a test.

    Of a hub repository only the configuration and the processor's files are fetched. Raises ModelError naming what is
    missing or unsupported.
    """
    try:
        config = load_config(_where(source), source)
        load_processor(_where(source), source, config)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config, trust_remote_code=source.trust_remote_code)
        described = describe(model)
    except ModelError:
        raise
    except UnsupportedFamilyError as error:
        raise ModelError(f"model {source.path}: {error}") from None
    except Exception as error:  # configuration and model code of any family, the hub client and the network
        raise ModelError(f"model {source.path}: its configuration cannot be read: {one_line(error)[:300]}") from None
    refusals: dict[str, dict[int, str]] = {}
    for layer, refused in enumerate(described.refusals):
        for action, reason in refused.items():
            if action is not Action.RUN:
                refusals.setdefault(action.label, {})[layer] = reason
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return ModelDescription(described.family, described.num_layers, parameters, refusals)


def _where(source: ModelSource) -> str:
    """Return a directory with a configuration, or the hub id as it stands."""
    if source.path in bundled_models() or source.path in BUILT_MODELS or source.path.count("/") != 1:
        return str(find_checkpoint(source))
    return source.path
