"""Tiny random-weight models and matching prompts, one `Family` per transformers architecture.

A family says how to build its config, what a picture looks like as tensors, which ids stand for it in the prompt, and
where its decoder layers are. The last point is written down by hand on purpose: the references must not
learn it from the code under test.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

VOCABULARY = 99
PAD = 0
FIRST_TEXT_ID, LAST_TEXT_ID = 20, 89  # ids below and above are kept for placeholders and special tokens
IMAGE, IMAGE_START, IMAGE_END, VIDEO = 90, 91, 92, 93

BATCH = "batch"
TEXT_BESIDE_PICTURES = "text-only prompt beside pictures"
RELOAD = "reload"
"""Keys of `Family.traps`."""

MAJOR, MINOR = map(int, transformers.__version__.split(".")[:2])


def since(release: str) -> bool:
    """Whether this release of transformers, such as "5.22", is that one or a newer one."""
    return tuple(map(int, release.split("."))) <= (MAJOR, MINOR)


CACHE = "cache" if since("5.24") else "past_key_values"
"""What a model's forward and its output call the KV cache."""

Seeds = Sequence[Sequence[int]]
"""Seeds of the pictures of every prompt of a batch: one inner sequence per prompt."""


@dataclass(frozen=True)
class Prompt:
    """A prompt as segments: a positive number is that many text ids, 0 is a picture. `seed` fixes ids and pixels."""

    segments: tuple[int, ...]
    seed: int = 0

    @property
    def images(self) -> int:
        return sum(segment == 0 for segment in self.segments)

    @property
    def picture_seeds(self) -> list[int]:
        return [1000 * (self.seed + 1) + number for number in range(self.images)]


@dataclass(frozen=True)
class Family:
    """How to build one tiny architecture and its inputs.

    `picture` turns picture seeds into the vision tensors of a batch. `placeholder` is the ids one picture takes in the
    prompt, of which those in `vision_ids` are vision tokens. `per_token(ids, prompt_length)` gives the extra inputs
    that grow with the sequence, for ids of shape [tokens]; each value is [tokens, ...].
    `refused` and `may_refuse` map a layer to the letters that the runtime must or may decline there.
    """

    name: str
    config: Callable[[], PreTrainedConfig]
    stack: str
    layers: int
    picture: Callable[[Seeds], dict[str, Tensor]] | None = None
    placeholder: tuple[int, ...] = ()
    vision_ids: frozenset[int] = frozenset({IMAGE})
    per_token: Callable[[Tensor, int], dict[str, Tensor]] | None = None
    max_images: int = 2
    text_only: bool = True
    refused: Mapping[int, str] = field(default_factory=dict)
    may_refuse: Mapping[int, str] = field(default_factory=dict)
    # Whether the runtime may decline the whole family, by a clear error.
    may_be_unsupported: bool = False
    # Plans that cannot work although each of their actions could alone, and the rule that sorts them out.
    refused_plans: tuple[str, ...] = ()
    possible: Callable[[str], bool] = lambda plan: True
    savable: Callable[[str], bool] = lambda plan: True
    # Largest difference of logits, as a share of the largest logit. Float32 sums in another order differ by a few 1e-6
    # over eight layers; a wrong mask, position or weight by 1e-3 and more.
    tolerance: float = 2e-5
    # What a reloaded pruned text config must say, from the kept layers' old indices.
    saved_lists: Callable[[tuple[int, ...]], dict[str, object]] = lambda kept: {}
    attention: str = "sdpa"  # "eager" where the library offers nothing faster
    build: Callable[[PreTrainedConfig, str], PreTrainedModel] | None = None
    # What the dense model gets wrong in plain transformers, before anything is skipped; the value is the reason.
    traps: Mapping[str, str] = field(default_factory=dict)

    @property
    def multimodal(self) -> bool:
        return self.picture is not None

    def __str__(self) -> str:
        return self.name


def gaussian_weights(model: PreTrainedModel, seed: int = 0) -> None:
    """Fill every parameter so that each layer changes the residual stream by about as much as it carries.

    The library's own initialisation (0.02) leaves tiny layers near the identity, and a comparison of two
    near-identities proves nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.numel() == 1:
                parameter.copy_(0.7 + 0.1 * noise)
            elif parameter.dim() == 1:
                parameter.add_(0.1 * noise)
            elif "embed" in name and parameter.dim() == 2:
                parameter.copy_(noise * min(1.0, 8 / math.sqrt(parameter.shape[-1])))
            else:
                fan_in = parameter[0].numel() if parameter.dim() != 3 else parameter.shape[-1]
                parameter.copy_(noise / math.sqrt(max(fan_in, 1)))


def build(family: Family, attention: str | None = None, seed: int = 0) -> PreTrainedModel:
    """A float32 model of the family in evaluation mode; the same seed gives the same weights in every call."""
    config = family.config()
    attention = attention or family.attention
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if family.build is not None:
            model = family.build(config, attention)
        else:
            auto = AutoModelForImageTextToText if family.multimodal else AutoModelForCausalLM
            model = auto.from_config(config, attn_implementation=attention)
    model = model.eval()
    assert model.dtype == torch.float32
    gaussian_weights(model, seed)
    model.tie_weights()
    settings = model.generation_config
    settings.eos_token_id = None  # every answer runs to its full length
    settings.bos_token_id = None
    settings.pad_token_id = PAD
    return model


def decoder_layers(model: PreTrainedModel, family: Family) -> nn.ModuleList:
    """The decoder layers, found by the family's own hand-written path."""
    layers = model.get_submodule(family.stack)
    assert isinstance(layers, nn.ModuleList) and len(layers) == family.layers, family.name
    return layers


def prompt_ids(family: Family, prompt: Prompt) -> Tensor:
    """The prompt's ids, shape [tokens]."""
    generator = torch.Generator().manual_seed(prompt.seed)
    ids: list[int] = []
    for segment in prompt.segments:
        if segment:
            ids += torch.randint(FIRST_TEXT_ID, LAST_TEXT_ID + 1, (segment,), generator=generator).tolist()
        else:
            ids += family.placeholder
    return torch.tensor(ids)


def vision_mask(family: Family, ids: Tensor) -> Tensor:
    """True where `ids` are vision tokens; same shape."""
    if not family.vision_ids:
        return torch.zeros_like(ids, dtype=torch.bool)
    return torch.isin(ids, torch.tensor(sorted(family.vision_ids)))


def batch_inputs(
    family: Family, prompts: Sequence[Prompt], generated: Sequence[Sequence[int]] | None = None
) -> dict[str, Tensor]:
    """Keyword arguments of `forward` and `generate` for prompts, padded on the left, with ids already generated.

    Shapes: input_ids and attention_mask are [batch, tokens].
    """
    starts = [prompt_ids(family, prompt) for prompt in prompts]
    answers = [torch.tensor(list(answer), dtype=torch.long) for answer in (generated or [[]] * len(prompts))]
    rows = [torch.cat(pair) for pair in zip(starts, answers, strict=True)]
    longest = max(len(row) for row in rows)
    inputs: dict[str, Tensor] = {
        "input_ids": torch.stack([_pad_left(row, longest, PAD) for row in rows]),
        "attention_mask": torch.stack([_pad_left(torch.ones_like(row), longest, 0) for row in rows]),
    }
    if family.per_token is not None:
        extras = [family.per_token(row, len(start)) for row, start in zip(rows, starts, strict=True)]
        for key in extras[0]:
            inputs[key] = torch.stack([_pad_left(extra[key], longest, 0) for extra in extras])
    if family.picture is not None and any(prompt.images for prompt in prompts):
        inputs |= family.picture([prompt.picture_seeds for prompt in prompts])
    return inputs


def forget_positions(model: PreTrainedModel) -> None:
    """Drop the rope deltas that multimodal-rotary models keep from one call to the next."""
    for module in model.modules():
        if getattr(module, "rope_deltas", None) is not None:
            module.rope_deltas = None


def pixels(seed: int, *shape: int) -> Tensor:
    """Pixels of one picture, standard normal, shape as given."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def flat(seeds: Seeds) -> list[int]:
    """All picture seeds of a batch in the order of the placeholders."""
    return [seed for row in seeds for seed in row]


def sliced(**lists: Sequence[object]) -> Callable[[tuple[int, ...]], dict[str, object]]:
    """`Family.saved_lists` for lists with one entry per layer: the entries of the kept layers."""
    return lambda kept: {name: [values[layer] for layer in kept] for name, values in lists.items()}


def keeps_one_of(*layers: int) -> Callable[[str], bool]:
    """Whether a plan leaves at least one of these layers in place."""
    return lambda plan: any(plan[layer] != "S" for layer in layers)


def everywhere(letters: str, layers: Iterable[int]) -> dict[int, str]:
    return dict.fromkeys(layers, letters)


def mixers(types: Sequence[str]) -> list[int]:
    """Layers without attention: keys and values, and so freeze and bypass, mean nothing there by themselves."""
    return [layer for layer, kind in enumerate(types) if kind in ("linear_attention", "conv")]


def _pad_left(row: Tensor, length: int, value: int) -> Tensor:
    padding = row.new_full((length - len(row), *row.shape[1:]), value)
    return torch.cat([padding, row])
