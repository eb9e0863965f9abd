"""Load processors where torchvision is missing or broken, without the part for videos that needs it.

transformers builds a video processor with every processor of a family that has one, and that needs torchvision. Its
wheels for CUDA cannot be imported beside torch's CPU build, after which most of transformers cannot either.

Imports torch and transformers only, and these late: the process that verifies an export runs this file by its path.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module, util
from importlib.abc import MetaPathFinder
from typing import Any


class BeforeTransformers(MetaPathFinder):
    """Hide a torchvision that cannot be imported from transformers, once that is about to be imported."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "transformers" and torchvision_problem():
            for module in [module for module in sys.modules if module.partition(".")[0] == "torchvision"]:
                del sys.modules[module]
            sys.modules["torchvision"] = None  # type: ignore[assignment]  # importlib reads it as "there is none"


@cache
def torchvision_problem() -> str:
    """Say why torchvision cannot be used; empty where it can be imported."""
    if util.find_spec("torchvision") is None:
        return "not installed"
    try:
        import_module("torchvision")
    except Exception as error:  # its loader and torch's registry raise all kinds here
        return " ".join(str(error).split()) or type(error).__name__
    return ""


def load_auto_processor(name: Any, **options: Any) -> Any:
    """Load a processor by directory or hub id as ``AutoProcessor`` does, its video part as settings if it has to be."""
    from transformers import AutoProcessor

    if torchvision_problem():
        with _video_settings_only():
            return AutoProcessor.from_pretrained(name, **options)
    return AutoProcessor.from_pretrained(name, **options)


@contextmanager
def _video_settings_only() -> Iterator[None]:
    """Replace the class that finds video processors by one that reads their settings."""
    from transformers import processing_utils
    from transformers.image_processing_base import ImageProcessingMixin
    from transformers.models.auto import video_processing_auto as auto

    class VideoSettings(ImageProcessingMixin):  # type: ignore[misc]
        """Settings of a video processor, saved as they were read; those that a checkpoint leaves out are None."""

        model_input_names = ()

        @classmethod
        def from_pretrained(cls, name: str, **options: Any) -> VideoSettings:
            options.pop("_from_auto", None)
            return cls(auto.get_video_processor_config(name, **options))

        def __init__(self, settings: dict[str, Any]) -> None:
            self.settings = settings

        def __getattr__(self, name: str) -> Any:
            if name.startswith("_") or name == "settings":  # looked for before __init__ where an object is copied
                raise AttributeError(name)
            return self.settings.get(name)

        def __call__(self, *arguments: Any, **options: Any) -> Any:
            raise ImportError("videos need torchvision; this processor was loaded without it")

        def to_dict(self) -> dict[str, Any]:
            return dict(self.settings)

    classes = processing_utils.MODALITY_TO_BASE_CLASS_MAPPING
    replaced = auto.AutoVideoProcessor, classes["video_processor"]
    auto.AutoVideoProcessor, classes["video_processor"] = VideoSettings, "ImageProcessingMixin"
    try:
        yield
    finally:
        auto.AutoVideoProcessor, classes["video_processor"] = replaced
