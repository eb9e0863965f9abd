"""``skipplan db``: the database's schema."""

from __future__ import annotations

import typer

from optimizer.cli.plans import AsJson
from optimizer.cli.state import open_database, print_json, print_line

app = typer.Typer(no_args_is_help=True, help="The database's schema.")


@app.command()
def upgrade(context: typer.Context, as_json: AsJson = False) -> int:
    """Create the tables, or bring them to this version's schema.

    [bold]Example:[/bold] skipplan --database postgresql://user:password@host/skipplan db upgrade
    """
    import os

    from optimizer.cli.state import global_options
    from optimizer.job.spec import DEFAULT_DATABASE
    from storage import migration
    from storage.database import Database

    url = global_options(context).database or os.environ.get("SKIPPLAN_DATABASE") or DEFAULT_DATABASE
    with Database.open(url, migrate=True) as db:
        if as_json:
            print_json({"database": db.safe_url, "schema": migration.current(db.engine)})
        else:
            print_line(f"{db.safe_url} has schema {migration.current(db.engine)}")
    return 0


@app.command()
def current(context: typer.Context, as_json: AsJson = False) -> int:
    """Print the schema's revision.

    [bold]Example:[/bold] skipplan db current
    """
    from storage import migration

    with open_database(context, check_schema=False) as db:
        if as_json:
            print_json({"database": db.safe_url, "schema": migration.current(db.engine)})
        else:
            print_line(migration.current(db.engine) or "none")
    return 0


@app.command()
def check(context: typer.Context, as_json: AsJson = False) -> int:
    """Compare the database with the tables that this version writes; exit code 4 when they differ.

    [bold]Example:[/bold] skipplan db check
    """
    from optimizer.errors import ClusterOrDatabaseFault
    from storage import migration

    with open_database(context, check_schema=False) as db:
        differences = migration.check(db.engine)
        if as_json:
            print_json({"database": db.safe_url, "differences": differences})
        if differences:
            raise ClusterOrDatabaseFault(f"{db.safe_url}: {'; '.join(differences)}")
        if not as_json:
            print_line(f"{db.safe_url} is as this version writes it")
    return 0
