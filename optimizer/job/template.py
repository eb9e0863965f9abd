"""The minimal job file written by ``skipplan init``, with a comment per field."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from optimizer.errors import UsageFault
from optimizer.job.loading import resolve_name
from workers.errors import ModelError, TaskError, TooFewSamplesError
from workers.messages import ModelSource
from workers.models.describe import ModelDescription, describe_model
from workers.runtime.plan import Action
from workers.tasks import load_spec, load_task
from workers.tasks.loading import settled
from workers.tasks.spec import FileSource, LmmsEvalSource, SplitSizes, TaskSpec

ACTIONS = tuple(action.label for action in Action if action is not Action.RUN)
TRIALS_PER_LAYER = 8
"""Plans tried for every decoder layer, at least ``FEWEST_TRIALS``."""
FEWEST_TRIALS = 100


@dataclass(frozen=True)
class FirstJob:
    """A job file's text, with the model's number of layers and its actions."""

    text: str
    layers: int
    actions: tuple[str, ...]


def describe(model: str, task: str, directory: Path) -> FirstJob:
    """Write the text of a job file in ``directory`` for a model and a task, after looking at both.

    Raises UsageFault when the model's configuration or the task cannot be read.
    """
    try:
        found = describe_model(ModelSource(resolve_name(model, directory)))
        spec = settled(load_spec(resolve_name(task, directory)))
        splits, remark = _splits(spec)
    except (ModelError, TaskError) as error:
        raise UsageFault(str(error)) from None
    actions = tuple(action for action in ACTIONS if found.layers_for(action))
    if not actions:
        raise UsageFault(f"model {model}: no layer may take any action: {_reasons(found, ACTIONS)}")
    fitted = spec.model_copy(update={"splits": splits})
    return FirstJob(_text(model, task, found, fitted, remark, actions), found.num_layers, actions)


def _splits(spec: TaskSpec) -> tuple[SplitSizes, str]:
    """Return the sizes of the task's splits, and a remark on them; smaller ones where its file has too few samples."""
    if isinstance(spec.source, FileSource | LmmsEvalSource):
        try:
            load_task(spec)
        except TooFewSamplesError as error:
            if not error.fitting:
                raise
            asked = " + ".join(str(getattr(spec.splits, name)) for name in error.fitting)
            fitting = spec.splits.model_copy(update=error.fitting)
            return fitting, f"the task asks for {asked} {spec.splits.unit}, more than its data has; these fit"
    return spec.splits, "as the task says; disjoint by image"


def _text(model: str, task: str, found: ModelDescription, spec: TaskSpec, remark: str, actions: Sequence[str]) -> str:
    trials = max(FEWEST_TRIALS, TRIALS_PER_LAYER * found.num_layers)
    splits, unit = spec.splits, spec.splits.unit
    others = [action for action in actions if action != "skip"]
    more = f" # this model also takes: {', '.join(others)}" if others and "skip" in actions else ""
    first = "skip" if "skip" in actions else actions[0]
    after_trials, after_held_out = (" " * (width - len(str(n))) for width, n in ((18, trials), (16, splits.held_out)))
    refused = "".join(f"\n# {line}" for line in _refused(found))
    return f"""\
# skipplan run FILE     every field: docs/jobs.md, or `skipplan validate FILE` after a change
#
# {_plain(model)}: family {found.family}, {found.num_layers} decoder layers (0 to {found.num_layers - 1}), \
{found.parameters / 1e6:,.0f} million parameters{refused}
# {_plain(spec.name)}: {spec.answer.kind} answers of up to {spec.answer.max_new_tokens} tokens, metric {spec.metric}
model:
  path: {_scalar(model)}

task: {_scalar(task)}

actions: [{first}]{more}
#   skip leaves a whole layer out, and exports as a plain checkpoint; freeze and bypass spare vision tokens only;
#   skip_attention and skip_mlp leave a part of the layer out, freeze_attention and freeze_mlp for vision tokens only.

constraint:
  max_accuracy_drop: 0.01   # one point, judged on the upper end of the loss's interval on held-out samples
  confidence: 0.95
  # min_speedup: 1.2        # measured on the live model, by the lower end of its interval

search:
  trials: {trials}{after_trials}# distinct plans to try; most are given up on a part of the search split
  seed: 0
  finalists: 6              # plans that are verified on held-out samples

splits:                     # {remark}
  calibration: {splits.calibration}
  search: {splits.search}
  held_out: {splits.held_out}{after_held_out}# more samples, narrower intervals
  unit: {unit}

workload:                   # what latency is measured for
  batch_size: 1
  new_tokens: {spec.answer.max_new_tokens}
latency:
  max_seconds: 60           # for each plan that is verified; less is sooner done, with wider intervals

# database: sqlite:///skipplan.db
# cluster: {{address: local, workers: auto}}
"""


def _refused(found: ModelDescription) -> list[str]:
    """Say for every action which layers may not take it."""
    return [
        f"{action}: not at {len(layers)} of {found.num_layers} layers ({next(iter(layers.values()))})"
        for action, layers in found.refusals.items()
    ]


def _reasons(found: ModelDescription, actions: Sequence[str]) -> str:
    return "; ".join(f"{action}: {next(iter(found.refusals[action].values()))}" for action in actions)


def _scalar(text: str) -> str:
    """Quote a text as YAML does, on one line."""
    return yaml.safe_dump(text, width=10_000, allow_unicode=True).removesuffix("\n").removesuffix("\n...")


def _plain(text: str) -> str:
    """Fold a name so that it cannot leave its comment."""
    return " ".join(text.split())
