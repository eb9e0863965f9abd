"""Format ``checkpoint``: a plain Hugging Face directory whose skipped layers are gone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from optimizer.exports.interface import ExportFault, ExportFormat, Guide, Loadable, Subject, needs_plain_skips
from workers.errors import ModelError


def write(subject: Subject, directory: Path) -> None:
    """Write the model without the layers that the plan skips, in the form of the hub's checkpoints."""
    from workers.serving.checkpoint import write_checkpoint

    _write(write_checkpoint, subject, directory)


def write_for_engine(subject: Subject, directory: Path, *, plain: bool = True) -> None:
    """Write the checkpoint with a chat template that engines read as transformers does.

    Where it need not be ``plain``, ``config.json`` says what an engine with a plug-in does beyond it.
    """
    from workers.serving.checkpoint import write_served_checkpoint

    _write(partial(write_served_checkpoint, plain=plain), subject, directory)


def _write(writer: Callable[..., None], subject: Subject, directory: Path) -> None:
    try:
        writer(subject.model, subject.plan, directory, subject.maps)
    except ModelError as error:
        raise ExportFault(str(error)) from None


def guide(subject: Subject, directory: Path) -> Guide:
    """How the checkpoint is loaded."""
    return Guide(
        usage="```python\n"
        "from transformers import AutoModelForImageTextToText, AutoProcessor\n\n"
        f'model = AutoModelForImageTextToText.from_pretrained("{directory.name}")\n'
        f'processor = AutoProcessor.from_pretrained("{directory.name}")\n'
        "```",
        limits=("A server that fixes the number of layers by the model's name must take it from `config.json`.",),
    )


def loadable(directory: Path, scratch: Path, python: str) -> Loadable:
    """Load the directory with transformers, without any code of ours."""
    return Loadable(directory, "transformers", python)


FORMAT = ExportFormat(
    name="checkpoint",
    summary="a plain Hugging Face checkpoint without the skipped layers",
    needs_model=True,
    refusal=needs_plain_skips,
    write=write,
    guide=guide,
    loadable=loadable,
)
