"""Lossless ways to decode side by side, in turns on equal prompts: what each takes of the dense model's time.

    skipplan run configs/scenes-lossless.yaml                       # its plan, then those of published methods,
    sed 's/kind: linear/kind: none/' configs/scenes-lossless.yaml > plain.yaml      # which do not compensate:
    skipplan run plain.yaml --strategy swift; skipplan run plain.yaml --strategy knapspec
    skipplan plans --lossless                                       # shows the ids
    PYTHONPATH=. python tests/benchmarks/lossless.py llava-12 scenes --plan ours=1 --plan swift=5 --plan knapspec=9 \
        --database sqlite:///skipplan.db --early-exit 8 --off-task easy-vqa --text README.md --output lossless.jsonl

Methods: `generate` of the dense model; `speculate` with every plan, given as `NAME=ID` of a published one, with its
maps, or as `NAME=LETTERS`; transformers' prompt lookup; transformers' early exit after `--early-exit` layers, and the
plan that drafts the same under `speculate`; a `drafter` export as transformers' assistant (`--assistant DIR`).

All methods answer each prompt, in an order that moves on, and each answer adds a line to `--output`; with `--resume` a
run goes on behind the last prompt. A method that raises is left out, and its message is in the summary beside the
output. On every kind of prompts, other tasks and a text that is continued among them, `speculate` begins anew.

Times are seconds of a request, and of decoding, which is from the first token's arrival on. Ratios are of sums over
prompts, dense / method, with a 95 % bootstrap interval over prompts, and quartiles of the prompts' own ratios.
Acceptance is the share of drafted tokens kept, among those up to the first refusal of each draft. Keep the machine
quiet.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from optimizer.exports import maps as exported_maps
from optimizer.exports.document import describe
from optimizer.exports.formats.drafter_loader import load_drafter
from storage.database import Database
from storage.records import lookup, plans
from workers.latency.request import device_name
from workers.messages import Artifact, ModelSource
from workers.models.inputs import prepare_batch
from workers.models.loading import LoadedModel, load_model
from workers.runtime import SkipPlan, speculate
from workers.runtime.folding import Maps
from workers.tasks import load_spec, load_task

WARM_UP = 3
TEXT_TOKENS = 32
RESAMPLES = 2000

Generate = Callable[..., Any]


@dataclass
class Answer:
    """One method's answer to one prompt."""

    prompts: str
    prompt: int
    method: str
    seconds: float
    decode_seconds: float
    """From the arrival of the first tokens on."""
    tokens: int
    decoded: int
    """Tokens behind those that came first."""
    passes: int
    """Of the dense model, the prompt's included."""
    drafted: int
    kept: int
    refusals: int
    equal: bool
    """To the dense model's answer."""


@dataclass
class Trace:
    """Follow one request: a streamer, and a hook of the dense model's passes."""

    prompt_tokens: int
    started: float = 0.0
    first: float = 0.0
    first_tokens: int = 0
    tokens: int = -1
    """Of the answer so far; -1 before the prompt is streamed."""
    widths: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    """Tokens before each pass."""

    def put(self, value: torch.Tensor) -> None:
        if self.tokens < 0:  # the prompt
            self.tokens = 0
            return
        self.tokens += value.numel()
        if not self.first_tokens:
            self.first, self.first_tokens = time.perf_counter(), self.tokens

    def end(self) -> None: ...

    def see(self, module: Any, arguments: Any, keywords: dict[str, Any]) -> None:
        """Note a pass of the dense model."""
        self.widths.append(keywords["input_ids"].shape[1])
        self.counts.append(max(0, self.tokens))

    def drafts(self) -> tuple[int, int, int]:
        """Return drafted and kept tokens, and the drafts of which one was refused."""
        drafted = kept = refusals = 0
        ends = [*self.counts[1:], self.tokens]
        for number, (width, before, after) in enumerate(zip(self.widths, self.counts, ends, strict=True)):
            own = width - (self.prompt_tokens if number == 0 else 1)
            gained = after - before
            last = number == len(self.widths) - 1
            drafted += own
            kept += min(gained, own) if last else gained - 1
            refusals += 0 if last else gained - 1 < own
        return drafted, kept, refusals


@dataclass
class Prompts:
    """Inputs of one kind of prompts, and how long their answers may get."""

    name: str
    inputs: list[dict[str, torch.Tensor]]
    new_tokens: int


def task_prompts(loaded: LoadedModel, name: str, count: int, new_tokens: int | None) -> Prompts:
    """Take the first held-out samples of a task."""
    spec = load_spec(name)
    task = load_task(spec.with_splits(calibration=1, search=1, held_out=count + WARM_UP))
    prepared = [prepare_batch(loaded, task, [sample]).inputs for sample in task.held_out[: count + WARM_UP]]
    return Prompts(
        name, [dict(each) for each in prepared if each is not None], new_tokens or spec.answer.max_new_tokens
    )


def text_prompts(loaded: LoadedModel, file: Path, count: int, new_tokens: int) -> Prompts:
    """Take pieces of a text, each to be continued."""
    tokens = loaded.processor.tokenizer(file.read_text(encoding="utf-8"), return_tensors="pt")["input_ids"][0]
    pieces = [tokens[at : at + TEXT_TOKENS] for at in range(0, len(tokens) - TEXT_TOKENS, TEXT_TOKENS)]
    pieces = pieces[: count + WARM_UP]
    inputs = [{"input_ids": each[None], "attention_mask": torch.ones_like(each)[None]} for each in pieces]
    return Prompts(f"text of {file.name}", inputs, new_tokens)


def read_plan(text: str, loaded: LoadedModel, database: str | None) -> tuple[SkipPlan, Maps | None]:
    """Return a plan by its letters, or by its id with its maps."""
    if not text.isdigit():
        return SkipPlan.parse(text), None
    if database is None:
        raise SystemExit(f"--plan {text}: name the --database that it is published in")
    with Database.open(database) as db:
        plan = plans.get(db, int(text))
        document = describe(plan, lookup.model(db, plan.model_id), lookup.task(db, plan.task_id))
    if document.model.fingerprint != loaded.fingerprint:
        raise SystemExit(f"--plan {text} is one of another model")
    artifact = None
    if plan.artifact is not None and plan.artifact_checksum is not None:
        artifact = Artifact(plan.artifact, plan.artifact_checksum)
    return SkipPlan.parse(plan.plan), exported_maps.read(document, exported_maps.fetch(document, artifact))


def methods(loaded: LoadedModel, given: argparse.Namespace, stack: ExitStack) -> dict[str, Generate]:
    """Return every method's generate."""
    model, layers = loaded.model, loaded.model.config.get_text_config(decoder=True).num_hidden_layers
    found: dict[str, Generate] = {"dense": model.generate}
    chosen = {name: read_plan(text, loaded, given.database) for name, text in given.plans}
    if given.early_exit:
        exit_plan = SkipPlan.parse("R" * given.early_exit + "S" * (layers - given.early_exit))
        chosen[f"early exit at {given.early_exit}, speculate"] = (exit_plan, None)
    for name, (plan, maps) in chosen.items():
        speculation = stack.enter_context(speculate(model, plan, maps, given.draft_length))
        found[f"{name} {plan.text}" if name not in plan.text else name] = speculation.generate
    # A placeholder copied from the prompt would ask for features that no image has.
    placeholder = getattr(model.config, "image_token_id", None)
    suppressed = {} if placeholder is None else {"suppress_tokens": [placeholder]}
    for number in given.prompt_lookup:
        options = {"prompt_lookup_num_tokens": number} | suppressed
        found[f"prompt lookup of {number}"] = lambda options=options, **inputs: model.generate(**inputs, **options)
    if given.early_exit:
        found[f"early exit at {given.early_exit}, transformers"] = lambda **inputs: model.generate(
            **inputs, assistant_early_exit=given.early_exit
        )
    if given.assistant is not None:
        drafter = load_drafter(given.assistant, dtype=loaded.dtype)
        found["assistant, transformers"] = lambda **inputs: model.generate(**inputs, assistant_model=drafter)
    return found


def ask(model: Any, generate: Generate, inputs: dict[str, Any], new_tokens: int) -> tuple[torch.Tensor, Trace, float]:
    """Answer one prompt; returns the answer's ids ``[tokens]``, what was followed, and when it was whole."""
    trace = Trace(inputs["input_ids"].shape[1])
    hook = model.register_forward_pre_hook(trace.see, with_kwargs=True)
    try:
        trace.started = time.perf_counter()
        found = generate(**inputs, do_sample=False, max_new_tokens=new_tokens, streamer=trace)
        ended = time.perf_counter()
    finally:
        hook.remove()
    return found[0, trace.prompt_tokens :], trace, ended


def measure(
    loaded: LoadedModel, prompts: Prompts, given: argparse.Namespace, known: set[int], left_out: dict[str, str]
) -> Iterator[Answer]:
    """Answer every prompt by all methods, in an order that moves on; note in ``left_out`` why one cannot."""
    with ExitStack() as stack:
        found = methods(loaded, given, stack)
        for number, inputs in enumerate(prompts.inputs):
            prompt = number - WARM_UP  # the first warm up, and teach speculate what drafting costs
            if prompt in known:
                continue
            names = list(found)
            turn = number % len(names)
            answers: dict[str, tuple[torch.Tensor, Trace, float]] = {}
            for name in names[turn:] + names[:turn]:
                try:
                    answers[name] = ask(loaded.model, found[name], inputs, prompts.new_tokens)
                except Exception as error:  # a method that cannot do it says why
                    left_out[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                    print(f"{prompts.name}: {name} is left out: {left_out[name]}", flush=True)
                    del found[name]
            dense = answers["dense"][0]
            if prompt < 0:
                continue
            for name, (tokens, trace, ended) in answers.items():
                drafted, kept, refusals = trace.drafts()
                yield Answer(
                    prompts.name,
                    prompt,
                    name,
                    ended - trace.started,
                    ended - trace.first,
                    trace.tokens,
                    trace.tokens - trace.first_tokens,
                    len(trace.widths),
                    drafted,
                    kept,
                    refusals,
                    torch.equal(tokens, dense),
                )


def ratio(dense: list[float], own: list[float]) -> dict[str, float]:
    """Ratio of sums, its bootstrap interval over prompts, and quartiles of the prompts' ratios."""
    first, second = np.array(dense), np.array(own)
    rows = np.random.default_rng(0).integers(0, len(first), (RESAMPLES, len(first)))
    low, high = np.quantile(first[rows].sum(1) / second[rows].sum(1), [0.025, 0.975])
    quartiles = statistics.quantiles(first / second, n=4)
    names = ("value", "low", "high", "quartile_1", "quartile_3")
    values = (first.sum() / second.sum(), low, high, quartiles[0], quartiles[2])
    return {name: round(float(value), 4) for name, value in zip(names, values, strict=True)}


def summary(answers: list[Answer]) -> Iterator[dict[str, Any]]:
    """Yield a row for every kind of prompts and method."""
    for kind in dict.fromkeys(each.prompts for each in answers):
        dense = {each.prompt: each for each in answers if (each.prompts, each.method) == (kind, "dense")}
        names = dict.fromkeys(each.method for each in answers if each.prompts == kind)
        for method in sorted(names, key=lambda each: each != "dense"):
            own = [each for each in answers if (each.prompts, each.method) == (kind, method)]
            if len(own) < 2:
                continue
            pairs = [(dense[each.prompt], each) for each in own]
            # Decoding by the token: answers that differ, and first tokens that come together, make other numbers.
            timed = [(a, b) for a, b in pairs if a.decoded and b.decoded]
            tested = sum(each.kept + each.refusals for each in own)
            yield {
                "prompts": kind,
                "method": method,
                "n": len(own),
                "equal": sum(each.equal for each in own),
                "tokens": sum(each.tokens for each in own),
                "acceptance": round(sum(each.kept for each in own) / tested, 4) if tested else None,
                "tokens_per_pass": round(sum(each.tokens for each in own) / sum(each.passes for each in own), 3),
                "milliseconds_per_token": round(
                    1000 * sum(b.decode_seconds for _, b in timed) / max(1, sum(b.decoded for _, b in timed)), 3
                ),
                "decoding": ratio(
                    [a.decode_seconds / a.decoded * a.tokens for a, _ in timed],
                    [b.decode_seconds / b.decoded * a.tokens for a, b in timed],
                )
                if len(timed) > 1
                else None,
                "request": ratio([a.seconds for a, _ in pairs], [b.seconds for _, b in pairs]),
            }


def show(answers: list[Answer]) -> None:
    """Print the rows as a table."""
    print("| prompts | method | n | equal | acceptance | tokens a pass | ms a token | decoding | request |")
    print("|---|---|---|---|---|---|---|---|---|")

    def interval(found: dict[str, float] | None) -> str:
        if found is None:
            return ""
        spread = f"quartiles {found['quartile_1']:.2f}, {found['quartile_3']:.2f}"
        return f"{found['value']:.2f} [{found['low']:.2f}, {found['high']:.2f}], {spread}"

    for row in summary(answers):
        acceptance = "" if row["acceptance"] is None else f"{row['acceptance']:.3f}"
        print(
            f"| {row['prompts']} | {row['method']} | {row['n']} | {row['equal']} | {acceptance} "
            f"| {row['tokens_per_pass']:.2f} | {row['milliseconds_per_token']:.2f} | {interval(row['decoding'])} "
            f"| {interval(row['request'])} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("task")
    parser.add_argument("--plan", dest="plans", action="append", default=[], type=lambda text: text.split("=", 1))
    parser.add_argument("--database", help="where plans with ids are published")
    parser.add_argument("--off-task", action="append", default=[])
    parser.add_argument("--text", type=Path, help="a file whose pieces are continued")
    parser.add_argument("--prompt-lookup", type=int, nargs="*", default=[3])
    parser.add_argument("--early-exit", type=int, help="layers before the exit")
    parser.add_argument("--assistant", type=Path, help="a drafter export")
    parser.add_argument("--draft-length", type=int, help="of speculate; adapts when left out")
    parser.add_argument("--new-tokens", type=int, help="most tokens of an answer; the task's own when left out")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("lossless.jsonl"))
    parser.add_argument("--resume", action="store_true")
    given = parser.parse_args()

    torch.set_num_threads(given.threads)
    transformers.logging.set_verbosity_error()
    loaded = load_model(ModelSource(given.model, dtype=given.dtype), device="cpu")
    machine = (
        f"{device_name(loaded.device)}, {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f} at the start; torch "
        f"{torch.__version__}, transformers {transformers.__version__}, {given.dtype}"
    )
    print(machine, flush=True)
    answers: list[Answer] = []
    left_out: dict[str, str] = {}
    if given.resume and given.output.is_file():
        lines = [json.loads(line) for line in given.output.read_text().splitlines()]
        answers = [Answer(**line) for line in lines if "machine" not in line]
    sets = [task_prompts(loaded, given.task, given.count, given.new_tokens)]
    sets += [task_prompts(loaded, name, given.count, given.new_tokens) for name in given.off_task]
    if given.text is not None:
        sets.append(text_prompts(loaded, given.text, given.count, given.new_tokens or TEXT_TOKENS))
    with given.output.open("a" if given.resume else "w") as output, suppress(KeyboardInterrupt):
        print(json.dumps({"machine": machine, "arguments": vars(given) | {"output": ""}}, default=str), file=output)
        for prompts in sets:
            known = {each.prompt for each in answers if each.prompts == prompts.name}
            for answer in measure(loaded, prompts, given, known, left_out):
                answers.append(answer)
                print(json.dumps(asdict(answer)), file=output, flush=True)
    show(answers)
    print(f"load {os.getloadavg()[0]:.1f} at the end")
    rows = {"machine": machine, "left_out": left_out, "rows": list(summary(answers))}
    given.output.with_suffix(".summary.json").write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
