"""``skipplan db``: the database's schema."""

from __future__ import annotations

import typer

from optimizer.cli.options import AsJson, database_url, open_database, print_either

app = typer.Typer(no_args_is_help=True, help="The database's schema.")


@app.command()
def upgrade(context: typer.Context, as_json: AsJson = False) -> int:
    """Create the tables, or bring them to this version's schema.

    [bold]Example:[/bold] skipplan --database postgresql://user:password@host/skipplan db upgrade
    """
    from storage import migration
    from storage.database import Database

    with Database.open(database_url(context), migrate=True) as db:
        schema = migration.current(db.engine)
        print_either(as_json, {"database": db.safe_url, "schema": schema}, [f"{db.safe_url} has schema {schema}"])
    return 0


@app.command()
def current(context: typer.Context, as_json: AsJson = False) -> int:
    """Print the schema's revision.

    [bold]Example:[/bold] skipplan db current
    """
    from storage import migration

    with open_database(context, check_schema=False) as db:
        schema = migration.current(db.engine)
        print_either(as_json, {"database": db.safe_url, "schema": schema}, [schema or "none"])
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
        same = [] if differences else [f"{db.safe_url} is as this version writes it"]
        print_either(as_json, {"database": db.safe_url, "differences": differences}, same)
        if differences:
            raise ClusterOrDatabaseFault(f"{db.safe_url}: {'; '.join(differences)}")
    return 0
