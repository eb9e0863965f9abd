"""Format ``runtime``: the checkpoint without what is skipped, and the code that freezes and bypasses the others.

The code is the package that the workers themselves run, copied as it is, with two small modules that make it Hugging
Face remote code. ``config.json`` gets a model type of its own, so that loading without the code fails instead of
quietly running every layer.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from importlib.util import find_spec
from pathlib import Path

from optimizer.exports.interface import (
    ExportFault,
    ExportFormat,
    Guide,
    Loadable,
    Subject,
    needs_plain_skips,
    takes_everything,
)
from storage.records.plans import LOSSLESS
from workers.engines.vllm_plugin.register import EXPORTED

CODE_DIRECTORY = "skipplan_runtime"
MODEL_CLASS = "SkipPlanForImageTextToText"
CONFIG_CLASS = "SkipPlanConfig"

CONFIGURATION = '''"""The configuration of a model under a skip plan."""

from {module} import {name}


class {CONFIG_CLASS}({name}):
    """``{name}`` with the plan of the remaining layers in ``skip_plan``.

    The file has a model type of its own, so that the model cannot be loaded by accident without its plan; to the
    model's code the configuration is an ordinary ``{name}``.
    """

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """Read the file, under the model type that the model's code knows."""
        values, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if values.get("model_type") == "{model_type}":
            values["model_type"] = cls.model_type
        return values, unused

    def to_dict(self):
        """The file's content, under the model type of the file."""
        return super().to_dict() | {{"model_type": "{model_type}"}}
'''

MODELING = '''"""The model under its skip plan."""

from {module} import {name}

from .applied import apply_permanently
from .configuration import {CONFIG_CLASS}
from .guard import Guarded
from .plan import SkipPlan


class {MODEL_CLASS}(Guarded, {name}):
    """``{name}`` whose layers do what ``config.skip_plan`` says, one letter per layer.

    Where ``config.guard_checksum`` names a guard, ``generate`` answers prompts outside of it with the dense model.
    """

    config_class = {CONFIG_CLASS}

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        apply_permanently(self, SkipPlan.parse(config.skip_plan))
'''


GUARDED = """

`generate` answers prompts like those of the task with the plan. Others need the dense model, which this directory does
not hold; without it such a prompt is an error:

```python
model.attach_dense(AutoModelForImageTextToText.from_pretrained(DENSE, dtype=model.dtype))  # equal weights are kept once
model.guard = None  # or: the plan answers everything
```"""
GUARD_LIMIT = (
    "The weights are those of the plan alone. Prompts outside of the guard are refused unless a dense model is "
    "attached; a batch with one such prompt is answered by the dense model as a whole."
)


def write(subject: Subject, directory: Path) -> None:
    """Write checkpoint, code, and a configuration that names the code."""
    from workers.runtime import save_pruned
    from workers.runtime.cutting import leave_out_tensors
    from workers.runtime.sublayers import unused_modules

    model = subject.model.model
    sources = {type(model): MODELING, type(model.config): CONFIGURATION}
    for kind in sources:
        if not kind.__module__.startswith("transformers.models."):
            raise ExportFault(f"--format: runtime needs a model class of transformers, not {kind.__module__}")
    removal = subject.plan.removal
    # transformers renames stored tensors for its own classes only.
    save_pruned(
        model,
        removal,
        directory,
        processor=subject.model.processor,
        original_names=False,
        compensation=subject.maps,
        checkpoint=subject.checkpoint,
    )
    leave_out_tensors(directory, unused_modules(model, subject.plan))
    model_type = EXPORTED + model.config.model_type
    code = directory / CODE_DIRECTORY
    code.mkdir()
    for module in runtime_modules():
        shutil.copyfile(module, code / module.name)
    for kind, template in sources.items():
        text = template.format(
            module=kind.__module__,
            name=kind.__name__,
            model_type=model_type,
            CONFIG_CLASS=CONFIG_CLASS,
            MODEL_CLASS=MODEL_CLASS,
        )
        (code / ("modeling.py" if template is MODELING else "configuration.py")).write_text(text, encoding="utf-8")
    guard = None if subject.guard is None else hashlib.sha256(subject.guard).hexdigest()
    _name_code(directory / "config.json", model_type, subject.plan.remainder.text, guard)


def runtime_modules() -> list[Path]:
    """Return the source files of the runtime."""
    found = find_spec("workers.runtime")
    assert found is not None and found.submodule_search_locations is not None
    return sorted(Path(found.submodule_search_locations[0]).glob("*.py"))


def changed_code(directory: Path) -> list[str]:
    """Names of code files in an export that are not what this version would write: they are not to be run unseen."""
    code = directory / CODE_DIRECTORY
    own = {module.name: module.read_bytes() for module in runtime_modules()}
    written = {file.name: file.read_bytes() for file in code.iterdir() if file.is_file()}
    generated = {"modeling.py", "configuration.py"}
    changed = {name for name in own.keys() | written.keys() if own.get(name) != written.get(name)} - generated
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return sorted(changed | {name for name in generated if not _is_generated(written.get(name), name, config)})


def _is_generated(content: bytes | None, name: str, config: dict[str, object]) -> bool:
    """Whether a generated module is its template filled in with names of transformers."""
    template = MODELING if name == "modeling.py" else CONFIGURATION
    lines = (content or b"").decode("utf-8", errors="replace").splitlines()
    imported = next((line for line in lines if line.startswith("from transformers.models.")), "")
    _, _, rest = imported.partition("from ")
    module, _, kind = rest.partition(" import ")
    if not all(part.isidentifier() for part in [*module.split("."), kind]):
        return False
    expected = template.format(
        module=module,
        name=kind,
        model_type=config.get("model_type"),
        CONFIG_CLASS=CONFIG_CLASS,
        MODEL_CLASS=MODEL_CLASS,
    )
    return content == expected.encode()


def _name_code(config_file: Path, model_type: str, remainder: str, guard_checksum: str | None) -> None:
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config |= {
        "architectures": [MODEL_CLASS],
        "auto_map": {
            "AutoConfig": f"{CODE_DIRECTORY}/configuration.{CONFIG_CLASS}",
            "AutoModelForImageTextToText": f"{CODE_DIRECTORY}/modeling.{MODEL_CLASS}",
        },
        "model_type": model_type,
        "skip_plan": remainder,
        **({} if guard_checksum is None else {"guard_checksum": guard_checksum}),
    }
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def guide(subject: Subject, directory: Path) -> Guide:
    """How the model is loaded, with and without remote code, and drafts for the dense one."""
    name, dense = directory.name, subject.document.model.name.replace("`", "")
    lossless = ""
    if not subject.plan.partial and needs_plain_skips(subject.plan, subject.document.compensation) is None:
        lossless = (
            f"rafting for the dense model, `{dense}`, whose answers are then given; of this directory the plan and its "
            "maps are read alone:\n\n```python\n"
            f'import sys; sys.path.insert(0, "{name}")\n'
            f"from {CODE_DIRECTORY} import speculate_from\n"
            "from transformers import AutoModelForImageTextToText\n\n"
            f'dense = AutoModelForImageTextToText.from_pretrained("{dense}")\n'
            f'with speculate_from(dense, "{name}") as speculation:\n'
            "    tokens = speculation.generate(**inputs)\n```"
        )
    if lossless and subject.document.mode == LOSSLESS:
        return Guide(
            usage=f"D{lossless}",
            limits=(
                f"`{CODE_DIRECTORY}/` needs torch and transformers only, of the versions below or close to them.",
                "`from_pretrained` of this directory gives the drafter alone, which answers otherwise than the dense "
                "model.",
                "Copy the directory to hand it on; `save_pretrained` does not write the code.",
            ),
        )
    return Guide(
        usage="As Hugging Face remote code:\n\n```python\n"
        "from transformers import AutoModelForImageTextToText, AutoProcessor\n\n"
        f'model = AutoModelForImageTextToText.from_pretrained("{name}", trust_remote_code=True)\n'
        f'processor = AutoProcessor.from_pretrained("{name}")\n'
        "```\n\nOr with the code imported from here, in three lines:\n\n```python\n"
        f'import sys; sys.path.insert(0, "{name}")\n'
        f"from {CODE_DIRECTORY}.modeling import {MODEL_CLASS}\n"
        f'model = {MODEL_CLASS}.from_pretrained("{name}")\n```'
        + (GUARDED if subject.guard else "")
        + (f"\n\nOr losslessly, d{lossless}" if lossless else ""),
        limits=(
            f"`{CODE_DIRECTORY}/` needs torch and transformers only, of the versions below or close to them.",
            *((GUARD_LIMIT,) if subject.guard else ()),
            "Frozen and bypassed layers need `sdpa` (the default) or `eager` attention.",
            "Loading without the code fails by design: the weights alone would run every layer for every token.",
            "Servers with model code of their own (SGLang, llama.cpp) cannot run frozen and bypassed layers, nor those "
            "without attention or without an MLP; vLLM with its plug-in can: export with `--format vllm`.",
            "Copy the directory to hand it on; `save_pretrained` does not write the code.",
        ),
    )


def loadable(directory: Path, scratch: Path, python: str) -> Loadable:
    """Load the directory with transformers with the directory's own code, if that code is ours."""
    changed = changed_code(directory)
    if changed:
        raise ExportFault(
            f"{directory / CODE_DIRECTORY} is not what this version of skipplan writes ({', '.join(changed)}), so it "
            "is not run; export again, or verify with the version that wrote it"
        )
    return Loadable(directory, "transformers-remote-code", python)


FORMAT = ExportFormat(
    name="runtime",
    summary="the checkpoint without what is skipped, and the code that freezes and bypasses other layers",
    needs_model=True,
    refusal=takes_everything,
    write=write,
    guide=guide,
    loadable=loadable,
    asks_guard=True,
    drafts=frozenset({LOSSLESS}),
)
