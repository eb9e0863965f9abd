"""Load a vision-language model with its processor, by path, bundled name, or hub id."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel, ProcessorMixin
from transformers.quantizers import AutoHfQuantizer

from workers.device.arithmetic import dtype_name, emulates
from workers.device.memory import memory_bytes
from workers.errors import ModelError
from workers.messages import ModelSource
from workers.runtime.quantised import UNPACKED, quantisation_of, unpack, without_progress_bars
from workers.text import first_line

from .checkpoint import (
    check_checkpoint,
    find_checkpoint,
    fingerprint_checkpoint,
    is_pickled,
    read_config,
    weight_files,
)
from .processors import load_processor
from .shared_weights import share_in_float32
from .spread import HeldBytes, Spread, spread_layers

_PARTS_OF_WEIGHTS = frozenset(
    ("weight_scale", "weight_scale_inv", "weight_packed", "weight_zero_point", "qweight", "qzeros", "scales", "absmax")
)
"""Names of tensors beside or in the place of a quantised weight, of which none may be left unread."""


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be measured, its processor, its fingerprint, and the name it was asked for by."""

    model: PreTrainedModel
    processor: ProcessorMixin
    fingerprint: str
    name: str
    directory: Path | None = None
    """Where its files are."""
    replaced_dtype: str = ""
    """The checkpoint's own dtype where float32 stands in for it, because the device would emulate it."""
    not_shared: str = ""
    """Why this process holds a copy of the weights of its own, where several could share one."""
    spread: Spread | None = None
    """How its layers lie on several devices, if they do."""

    @property
    def device(self) -> torch.device:
        """Device that the model's inputs go to."""
        device: torch.device = self.model.device
        return device

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """All devices that it computes on, that of its inputs first."""
        return (self.device,) if self.spread is None else self.spread.devices

    def states_left_in_place(self) -> AbstractContextManager[None]:
        """Have the layers of a model on several devices hand states on as they do without a worker around them."""
        return nullcontext() if self.spread is None else self.spread.states_left_in_place()

    @property
    def dtype(self) -> torch.dtype:
        """Dtype that the model was loaded in; some families keep a few of their modules in float32."""
        dtype: torch.dtype = self.model.config.dtype or self.model.dtype
        return dtype

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())


def load_model(
    source: ModelSource,
    *,
    device: str | None = None,
    measuring: bool = False,
    gpus: int = 1,
    device_map: Mapping[str, str] | None = None,
) -> LoadedModel:
    """Load a model for inference.

    ``device`` overrides the source's; ``"auto"`` is a GPU if one can be seen, else the CPU. The dtype ``"auto"`` is the
    checkpoint's own; with ``measuring``, float32 where the device would emulate that. Weights go from their files
    straight to a GPU; on the CPU they stay in their files, mapped into memory. With ``measuring``, that is so in
    float32 as well (:mod:`workers.models.shared_weights`). On GPUs the layers are spread over ``gpus`` of them
    (:mod:`workers.models.spread`), or as ``device_map`` of accelerate says, which may name the CPU and the disk.

    Raises:
        ModelError: the model is not there, not of a supported kind, corrupt, incomplete, or larger than the GPUs.
    """
    target = choose_device(device or source.device)
    directory = find_checkpoint(source)
    check_checkpoint(directory, source.allow_pickle, trust_remote_code=source.trust_remote_code)
    config = load_config(directory, source)

    def fingerprint() -> str:
        return fingerprint_checkpoint(directory, source.allow_pickle, trust_remote_code=source.trust_remote_code)

    replaced = not_shared = ""
    if measuring and source.dtype == "auto":
        own = config.dtype or _load_weights(directory, source, config).config.dtype  # not every one names it
        if emulates(own, torch.device(target)):
            source, replaced = replace(source, dtype="float32"), dtype_name(own)
    place, files = directory, weight_files(directory, source.allow_pickle)
    shareable = target == "cpu" and source.dtype == "float32" and not is_pickled(files)
    if measuring and shareable and not quantisation_of(config):
        place, not_shared = share_in_float32(directory, files, fingerprint)
    if device_map is None and target == "cuda":
        device_map = _over_gpus(source, config, gpus)
    spread = len(set((device_map or {}).values())) > 1
    if spread and quantisation_of(config) == UNPACKED:
        raise ModelError(
            f"model {source.path}: its weights are quantised ({UNPACKED}), which places them itself when it unpacks "
            "them: they are not spread over several devices; set cluster.gpus_per_worker to 1"
        )
    model = _load_weights(place, source, config, device_map)
    model.config._name_or_path = str(directory)
    unpack(model)
    return LoadedModel(
        model=model.eval(),
        processor=load_processor(directory, source, config),
        fingerprint=fingerprint(),
        name=source.path,
        directory=directory,
        replaced_dtype=replaced,
        not_shared=not_shared,
        spread=Spread(model) if spread else None,
    )


def _over_gpus(source: ModelSource, config: Any, gpus: int) -> dict[str, str]:
    """Return the device map over the first GPUs. Raises ModelError where they are too few, or too small."""
    if gpus > torch.cuda.device_count():
        there = torch.cuda.device_count()
        raise ModelError(f"cluster.gpus_per_worker: the model is to be spread over {gpus} GPUs, torch sees {there}")
    if gpus == 1 and quantisation_of(config) not in ("", UNPACKED):
        return {"": "cuda:0"}  # nothing to spread
    rooms = [(f"cuda:{number}", memory_bytes(torch.device("cuda", number))) for number in range(gpus)]
    dtype = (config.dtype or torch.float32) if source.dtype == "auto" else getattr(torch, source.dtype)
    try:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(
                copy.deepcopy(config), dtype=dtype, trust_remote_code=source.trust_remote_code
            )
        held = None if quantisation_of(config) in ("", UNPACKED) else quantised_bytes(model, config, dtype)
    except Exception as error:  # model code of any family
        raise ModelError(f"model {source.path}: cannot be loaded: {first_line(error)}") from None
    places = spread_layers(model, dtype, rooms, source.path, held)
    return places if gpus > 1 else {"": rooms[0][0]}


def quantised_bytes(model: PreTrainedModel, config: Any, dtype: torch.dtype) -> HeldBytes:
    """Give a model on torch's meta device the parameters of its quantised weights; return what each takes."""
    quantiser = AutoHfQuantizer.from_config(copy.deepcopy(_quantisation_config(config)), pre_quantized=True)
    place = {"": 0}
    quantiser.validate_environment(device_map=place)
    quantiser.preprocess_model(model, dtype=dtype, device_map=place)
    return lambda name, each: each.numel() * quantiser.param_element_size(model, name, each)


def choose_device(device: str) -> str:
    """Resolve ``"auto"``. Raises ModelError for a device that is not there."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise ModelError(f"device {device!r} is none of auto, cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ModelError("device cuda was asked for, but torch sees no GPU here; use auto or cpu")
    return device


def load_config(directory: Path | str, source: ModelSource) -> Any:
    """Read the configuration at a directory or hub id. Raises ModelError when it is of no model that can be loaded."""
    if Path(directory).is_dir():
        read_config(Path(directory))  # says more than transformers where it is missing
    try:
        config = AutoConfig.from_pretrained(
            directory, revision=source.revision, trust_remote_code=source.trust_remote_code
        )
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ModelError(f"model {source.path}: config.json is not usable: {first_line(error)}") from None
    _require_quantiser(source, config)
    known = type(config) in AutoModelForImageTextToText._model_mapping
    remote = source.trust_remote_code and "AutoModelForImageTextToText" in (getattr(config, "auto_map", None) or {})
    if not known and not remote:
        raise ModelError(
            f"model {source.path}: architecture {config.model_type!r} is no image-text-to-text model of transformers"
        )
    return config


def _quantisation_config(config: Any) -> Any:
    return getattr(config, "quantization_config", None) or config.text_config.quantization_config


def _require_quantiser(source: ModelSource, config: Any) -> None:
    """Refuse quantised weights that transformers would not load as such, or not without a package that is missing.

    Whether the device is one for them is said by who loads the weights: it may be another machine's.
    """
    method = quantisation_of(config)
    if not method:
        return
    quantised = f"model {source.path}: its weights are quantised ({method})"
    settings = _quantisation_config(config)
    if not AutoHfQuantizer.supports_quant_method(settings):  # it would take them for plain ones
        raise ModelError(f"{quantised}, which transformers does not load; take the checkpoint that it was made of")
    try:
        with without_progress_bars():
            AutoHfQuantizer.from_config(copy.deepcopy(settings)).validate_environment()
    except ImportError as error:
        raise ModelError(f"{quantised}; {first_line(error)}") from None
    except Exception:  # no device for them here, or settings that are not theirs
        return


def _load_weights(
    directory: Path, source: ModelSource, config: Any, device_map: Mapping[str, str] | None = None
) -> PreTrainedModel:
    if source.dtype != "auto" and not isinstance(getattr(torch, source.dtype, None), torch.dtype):
        raise ModelError(f"dtype {source.dtype!r} is no torch dtype; use auto, float32, bfloat16 or float16")
    try:
        with without_progress_bars() if quantisation_of(config) else nullcontext():
            model, report = AutoModelForImageTextToText.from_pretrained(
                directory,
                config=config,
                dtype=source.dtype,
                attn_implementation=source.attention,
                device_map=None if device_map is None else dict(device_map),
                offload_folder=tempfile.gettempdir(),
                use_safetensors=not is_pickled(weight_files(directory, source.allow_pickle)),
                weights_only=True,
                trust_remote_code=source.trust_remote_code,
                output_loading_info=True,
            )
    except Exception as error:  # model code of any family, safetensors and torch raise all kinds here
        raise ModelError(f"model {source.path}: cannot be loaded: {first_line(error)}") from None
    missing = sorted(report["missing_keys"]) + sorted(str(entry[0]) for entry in report["mismatched_keys"])
    if missing:
        # transformers would fill these with random numbers and go on.
        raise ModelError(
            f"model {source.path}: {len(missing)} weights are missing or of another shape than the config says, "
            f"for example {missing[0]}"
        )
    left = [name for name in report["unexpected_keys"] if name.rpartition(".")[2] in _PARTS_OF_WEIGHTS]
    if left:
        raise ModelError(f"model {source.path}: transformers reads its quantised weights without {sorted(left)[0]}")
    if getattr(getattr(model, "generation_config", None), "max_time", None) is not None:
        raise ModelError(
            f"model {source.path}: max_time in its generation settings lets a clock decide where an answer ends; "
            "take it out of generation_config.json"
        )
    loaded: PreTrainedModel = model
    return loaded
