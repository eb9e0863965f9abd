"""Judge criteria on several models: rank correlation of risk and measured harm, model by model and action by action.

    PYTHONPATH=tests python -m reference_training.train_families
    python tests/benchmarks/criterion_models.py measure --work measured
    python tests/benchmarks/criterion_models.py report --work measured --criterion calibrated

``measure`` takes every measurement and the harm of every single action once for each entry of `SUBJECTS`, and keeps
them in one document each (`criterion_measured.py`); one that is there, of the same job and model files, is not measured
again. ``report`` reads all documents in the directory. A criterion's figure is Spearman's rho between its risk, from
calibration samples, and the mean divergence of held-out answers. Intervals are for other layers and other images of the
same models. Models that a criterion was designed on (`DESIGNED_ON`, and --selection for more) are left out of a second
table and its bars, and so are those that share layers with them.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from criterion_measured import VERSION, MeasuredModel, collect, load, store

from optimizer import criteria
from optimizer.criteria import Risk
from optimizer.job.inputs import model_fingerprint
from optimizer.job.loading import load_job
from optimizer.job.spec import JobSpec
from optimizer.registries import CRITERIA
from optimizer.statistics.rank_agreement import resampled, spearman
from workers.errors import MeasurementError
from workers.models.cache import cache_directory

ACTIONS = {"F": "freeze", "B": "bypass", "S": "skip"}
PUBLISHED = ("cosine", "block-influence", "angular", "layer-contribution", "vtw", "late-entry", "early-exit")
TRIES_ALL = "layer-contribution"
"""Runs every action at every layer: what a calibrated criterion avoids. The bars are said with it and without."""
MARGIN = 0.05
CAPTIONS = {
    "name": "captions",
    "source": {"kind": "scenes", "seed": 0},
    "prompt": "describe the image",
    "answer": {"kind": "short", "max_new_tokens": 24},
    "metric": "exact_match",
    "secondary": ["token_f1"],
    "splits": {"unit": "images", "calibration": 256, "search": 500, "held_out": 500},
}


@dataclass(frozen=True)
class Subject:
    """A model, the task it is judged on, and how many samples are measured: calibration, held-out."""

    model: str
    task: str
    calibration: int = 64
    held_out: int = 128
    group: str = ""
    """Models of one group share layers: none of them is left out alone."""

    @property
    def path(self) -> str:
        """A model of `reference_training.train_families` is a directory, any other one is known by its name."""
        trained = cache_directory() / "families" / self.model / "checkpoint"
        return str(trained) if self.model in FAMILIES else self.model


FAMILIES = ("qwen2-10", "phi-8", "olmo2-14", "gemma3-12", "captioner")
CAPTIONING = ("gemma3-12", "captioner")
SUBJECTS = (
    Subject("llava-12", "easy-vqa"),
    Subject("llava-12", "captions"),
    Subject("smollm2-30", "easy-vqa", 32, 64, "smollm2"),
    Subject("smollm2-30-scenes", "captions", 32, 48, "smollm2"),
    *(Subject(name, "captions" if name in CAPTIONING else "easy-vqa") for name in FAMILIES),
)


KNOWN = tuple(dict.fromkeys(each.model for each in SUBJECTS))
GROUPS = {each.model: each.group or each.model for each in SUBJECTS}
DESIGNED_ON = {
    "skip-it": ("llava-12", "smollm2-30", "captioner"),
    "skip-it-static": ("llava-12", "smollm2-30"),
    "skip-it-causal": ("llava-12", "smollm2-30"),
    "calibrated": ("llava-12", "qwen2-10", "phi-8", "olmo2-14", "gemma3-12"),
}
"""Models whose measurements were seen when a criterion was made."""


def measure(work: Path, models: Sequence[str]) -> None:
    """Write the documents that are not there yet, or are of other settings or files."""
    work.mkdir(parents=True, exist_ok=True)
    captions = (work / "captions.yaml").resolve()
    captions.write_text(yaml.safe_dump(CAPTIONS, sort_keys=False))
    for subject in SUBJECTS:
        stem = f"{subject.model}-{subject.task}"
        document, file = work / f"{stem}.json", work / f"{stem}.yaml"
        if subject.model not in models:
            continue
        splits = {"calibration": subject.calibration, "search": 32, "held_out": subject.held_out, "unit": "samples"}
        job = {
            "model": {"path": subject.path, "dtype": "float32"},
            "task": str(captions) if subject.task == "captions" else subject.task,
            "actions": ["skip", "freeze", "bypass"],
            "database": f"sqlite:///{(work / stem).resolve()}.db",
            "splits": splits,
            "cluster": {"workers": 1},
        }
        file.write_text(yaml.safe_dump(job, sort_keys=False))
        name = f"{subject.model}, {subject.task}"
        settings = {"version": VERSION, "name": name, "job": job, "samples": subject.held_out}
        there = load(document) if document.exists() else {}
        if there and there.items() >= (settings | {"model": model_fingerprint(load_job(file))}).items():
            continue
        store(collect(file, subject.held_out) | settings, document)
        print(f"{name}: measured", flush=True)


@dataclass(frozen=True)
class Judged:
    """One model and action: the rank correlation of every criterion, and the same under resampling."""

    name: str
    """Model and task."""
    action: str
    rho: Mapping[str, float]
    draws: Mapping[str, np.ndarray]
    """``[resamples]``; the same layers and images for all criteria."""

    @property
    def group(self) -> str:
        """The models that share layers with this one, by one name."""
        return group_of(self.name.partition(",")[0])


def group_of(model: str) -> str:
    return GROUPS.get(model, model)


def risks_of(found: MeasuredModel, names: Sequence[str]) -> dict[str, Risk]:
    """Risks by criterion, of those that the model gives the measurements for."""
    risks = {}
    for name in names:
        try:
            risks[name] = criteria.load(name).risk(found.table)
        except MeasurementError as error:
            print(f"- {name} is left out: {found.name}: {error}")
    return risks


def judge(found: MeasuredModel, risks: Mapping[str, Risk], seed: int) -> list[Judged]:
    """Correlations of each criterion with harm, by action."""
    result = []
    for letter, action in ACTIONS.items():
        harm = found.harm.get(letter, {})
        layers = sorted(harm)
        divergences = np.array([harm[layer] for layer in layers])
        values = {name: np.array([risk.of(layer, letter) for layer in layers]) for name, risk in risks.items()}
        rho = {name: spearman(risk, divergences.mean(1)) or 0.0 for name, risk in values.items()}
        draws = {name: resampled(risk, divergences, found.images, seed) for name, risk in values.items()}
        result.append(Judged(found.name, action, rho, draws))
    return result


def mean(judged: Sequence[Judged], name: str) -> float:
    return float(np.mean([each.rho[name] for each in judged]))


def best_of(judged: Sequence[Judged], names: Sequence[str] = PUBLISHED) -> str:
    """The criterion of the highest mean."""
    return max(names, key=lambda name: mean(judged, name))


def interval(draws: np.ndarray) -> str:
    low, high = np.quantile(draws, [0.025, 0.975])
    return f"[{low:+.2f}, {high:+.2f}]"


def mean_draws(judged: Sequence[Judged], name: str) -> np.ndarray:
    return np.mean([each.draws[name] for each in judged], axis=0)


def table(judged: Sequence[Judged], names: Sequence[str], own: str) -> list[str]:
    """Mean rho over the actions by model, over everything by criterion, and the smallest of all."""
    names_here = list(dict.fromkeys(each.name for each in judged))
    heads = ["criterion", *names_here, *ACTIONS.values(), "mean", "smallest"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name in sorted(names, key=lambda name: -mean(judged, name)):
        cells = [mean([each for each in judged if each.name == here], name) for here in names_here]
        cells += [mean([each for each in judged if each.action == action], name) for action in ACTIONS.values()]
        shown = [f"{cell:+.2f}" for cell in cells]
        shown.append(f"{mean(judged, name):+.2f} {interval(mean_draws(judged, name))}")
        shown.append(f"{min(each.rho[name] for each in judged):+.2f}")
        lines.append(f"| {f'**{name}**' if name == own else name} | " + " | ".join(shown) + " |")
    return lines


def left_out(judged: Sequence[Judged], own: str) -> list[str]:
    """For each group of models the published criterion that is best on the others, and what it does on this one."""
    lines = [
        f"| left out | best published on the others | its rho here | {own} | best published here |",
        "|---" * 5 + "|",
    ]
    groups = list(dict.fromkeys(each.group for each in judged))
    for group in groups if len(groups) > 1 else ():
        here = [each for each in judged if each.group == group]
        chosen = best_of([each for each in judged if each.group != group])
        best = best_of(here)
        lines.append(
            f"| {group} | {chosen} | {mean(here, chosen):+.2f} | {mean(here, own):+.2f} | "
            f"{best} {mean(here, best):+.2f} |"
        )
    return lines


def bars(judged: Sequence[Judged], own: str, rivals: Sequence[str]) -> list[str]:
    """The two bars, each with pass or fail."""
    best = best_of(judged, rivals)
    gain = mean(judged, own) - mean(judged, best)
    draws = mean_draws(judged, own) - mean_draws(judged, best)
    passed = gain >= MARGIN and np.quantile(draws, 0.025) > 0
    lines = [
        f"- mean rho {mean(judged, own):+.3f}, best of {len(rivals)} ({best}) {mean(judged, best):+.3f}: {gain:+.3f} "
        f"{interval(draws)}, wanted {MARGIN:+.2f} and an interval above 0: {'pass' if passed else 'fail'}"
    ]
    behind = []
    for each in judged:
        name = best_of([each], rivals)
        gap = each.rho[own] - each.rho[name]
        if gap < -MARGIN:
            spread = interval(each.draws[own] - each.draws[name])
            behind.append(f"{each.name}, {each.action}: {gap:+.2f} {spread} ({name})")
    lines.append(
        f"- at most {MARGIN} behind the best on every model and action: "
        f"{'pass' if not behind else f'fail in {len(behind)} of {len(judged)}'}"
    )
    return lines + [f"  - {line}" for line in behind]


def report(work: Path, own: str, selection: Sequence[str]) -> None:
    found = [MeasuredModel.read(file) for file in sorted(work.glob("*.json"))]
    if not found:
        raise SystemExit(f"{work}: holds no documents; `measure` writes them")
    seen: dict[tuple[str, str], str] = {}
    for each in found:
        if other := seen.get((each.model, each.task)):
            raise SystemExit(f"{work}: {each.name} and {other} are documents of the same model and task; remove one")
        seen[each.model, each.task] = each.name
        samples, images = len(each.images), len(set(each.images))
        print(f"- {each.name}: {each.table.num_layers} layers, {samples} held-out samples of {images} images")
    risks = [risks_of(each, [*CRITERIA]) for each in found]
    names = [name for name in CRITERIA if all(name in each for each in risks)]
    if own not in names:
        raise SystemExit(f"{own}: a document lacks a measurement that this criterion needs")
    judged = [
        row
        for seed, (each, own_risks) in enumerate(zip(found, risks, strict=True))
        for row in judge(each, {name: own_risks[name] for name in names}, seed)
    ]
    cheaper = [name for name in PUBLISHED if name != TRIES_ALL]
    groups = {"All models": judged}
    designed_on = {group_of(model) for model in (*DESIGNED_ON.get(own, ()), *selection)}
    others = [each for each in judged if each.group not in designed_on]
    if not others:
        print(f"\nOn every model something was chosen for {own}: none is held out.")
    elif len(others) < len(judged):
        groups["Models on which nothing was chosen"] = others
    for title, rows in groups.items():
        print(f"\n{title}:\n", *table(rows, names, own), "", *left_out(rows, own), sep="\n")
        for heading, rivals in (("all published", PUBLISHED), (f"those but {TRIES_ALL}", cheaper)):
            print(f"\nBars against {heading}:\n", *bars(rows, own, rivals), sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", choices=("measure", "report"))
    parser.add_argument("--work", type=Path, required=True, help="directory of the documents")
    parser.add_argument("--models", nargs="+", choices=KNOWN, default=KNOWN, help="to measure")
    parser.add_argument(
        "--criterion", choices=[*CRITERIA], default=JobSpec.model_fields["criterion"].default, help="the one to judge"
    )
    parser.add_argument(
        "--selection", nargs="*", choices=KNOWN, default=[], help="further models that the criterion was designed on"
    )
    options = parser.parse_args()
    if options.command == "measure":
        measure(options.work, options.models)
    else:
        report(options.work, options.criterion, options.selection)


if __name__ == "__main__":
    main()
