"""Interface of an export format, and what formats have in common."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from optimizer.errors import UsageFault
from optimizer.exports.document import PlanDocument
from workers.messages import ModelSource
from workers.runtime import SkipPlan

if TYPE_CHECKING:
    from workers.models.loading import LoadedModel
    from workers.runtime.folding import Maps

Loader = Literal["transformers", "transformers-remote-code", "drafter", "speculation"]


@dataclass(frozen=True)
class Subject:
    """A plan to export and, for formats that need it, the model it belongs to."""

    document: PlanDocument
    source: ModelSource
    checkpoint: Path | None
    """The model's directory; None for formats that need no model."""
    fingerprint: str | None
    """Of that directory."""
    loaded: LoadedModel | None
    """The model on the CPU in its own dtype; None for formats that do not load it."""
    maps: Maps | None = None
    """The maps of the plan's gaps; None where skips are plain, and for formats that do not load the model."""
    guard: bytes | None = None
    """The file of the plan's guard; None where there is none."""

    @property
    def plan(self) -> SkipPlan:
        """The plan as a value."""
        return SkipPlan.parse(self.document.plan)

    @property
    def model(self) -> LoadedModel:
        """The loaded model; only formats that ask for it have one."""
        assert self.loaded is not None
        return self.loaded


@dataclass(frozen=True)
class Guide:
    """Sections of the model card about a format, as Markdown."""

    usage: str
    limits: Sequence[str]


@dataclass(frozen=True)
class Loadable:
    """A written model and what loads it.

    ``drafter`` is loaded as the assistant of the dense model, ``speculation`` by its own ``speculate_from``.
    """

    directory: Path
    loader: Loader
    python: str
    """The interpreter that loads it."""


@dataclass(frozen=True)
class ExportFormat:
    """An export format: which plans it takes, how it writes them, and how that is loaded.

    ``refusal`` says why a plan (with its kind of compensation) cannot be handed on this way, or None. ``write`` fills
    an empty directory. ``loadable`` gives what ``verify-export`` loads, from the written directory, a scratch
    directory and the interpreter asked for; None for formats that hold no model. ``engine`` names the engine of
    ``workers.engines`` that serves what is written. ``check`` says what can be said about the surroundings, such as
    whether the program that the commands call is there. ``drafts`` has the modes of the plans that, so written, draft
    for the dense model, so that the dense model's answers are verified; ``asks_guard`` says that it asks the plan's
    guard by itself.
    """

    name: str
    summary: str
    needs_model: bool
    refusal: Callable[[SkipPlan, str], str | None]
    write: Callable[[Subject, Path], None]
    guide: Callable[[Subject, Path], Guide]
    loadable: Callable[[Path, Path, str], Loadable] | None = None
    engine: str | None = None
    check: Callable[[], Sequence[str]] = tuple
    drafts: frozenset[str] = frozenset()
    asks_guard: bool = False


def takes_everything(plan: SkipPlan, compensation: str) -> str | None:
    """Refuse no plan."""
    return None


def needs_plain_skips(plan: SkipPlan, compensation: str) -> str | None:
    """Refuse what a checkpoint without code cannot say."""
    for layer in plan.needs_code:
        return f"layer {layer} is {plan[layer].letter} ({plan[layer].label}), which takes code to run"
    return None


def plan_in(directory: Path) -> SkipPlan | None:
    """Return what the layers of the checkpoint do; None where they all run, so that it is a plain one."""
    text = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("skip_plan")
    return None if text is None else SkipPlan.parse(text)


class ExportFault(UsageFault):
    """An export that cannot be written or verified; the message says why and what can be done."""
