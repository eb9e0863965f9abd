"""``skipplan tokens``: who may use the HTTP API of `skipplan dashboard --api`."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from optimizer.cli.options import AsJson, open_database, print_either, print_json, print_line

app = typer.Typer(no_args_is_help=True, help="The tokens of the HTTP API.")

Name = Annotated[str, typer.Argument(metavar="NAME", help="Whom the token is for.", show_default=False)]
Role = Literal["read", "submit", "admin"]


@app.command()
def create(
    context: typer.Context,
    name: Name,
    role: Annotated[Role, typer.Option("--role", help="What its bearer may do.")] = "read",
    as_json: AsJson = False,
) -> int:
    """Make a token and print it; it cannot be shown again.

    read: look. submit: also submit jobs, steer those, and export plans. admin: also steer all jobs, run a model's code,
    choose the cluster, and submit with a priority above 0.

    [bold]Example:[/bold] skipplan tokens create ci --role submit
    """
    from storage.queue import tokens

    with open_database(context, create=True) as db:
        token, text = tokens.create(db, name, role)
    print_either(as_json, {"name": token.name, "role": token.role, "token": text}, [text])
    return 0


@app.command("list")
def list_(context: typer.Context, as_json: AsJson = False) -> int:
    """List the tokens, without their secrets.

    [bold]Example:[/bold] skipplan tokens list
    """
    from storage.queue import tokens

    with open_database(context) as db:
        found = tokens.list_tokens(db)
    if as_json:
        print_json([{"name": each.name, "role": each.role, "created": each.created_at.isoformat()} for each in found])
        return 0
    for each in found:
        print_line(f"{each.name:<24} {each.role:<8} {each.created_at:%Y-%m-%d %H:%M}")
    return 0


@app.command()
def remove(context: typer.Context, name: Name) -> int:
    """Make a token void at once; its jobs stay.

    [bold]Example:[/bold] skipplan tokens remove ci
    """
    from storage.queue import tokens

    with open_database(context) as db:
        tokens.remove(db, name)
    print_line(f"token {name} removed")
    return 0
