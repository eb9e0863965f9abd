"""``skipplan dashboard``: jobs, plans and reports in a browser."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from optimizer.cli.state import open_database


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(dashboard)


def dashboard(
    context: typer.Context,
    host: Annotated[str, typer.Option("--host", help="Address to listen on; a token is needed beyond loopback.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port to listen on.")] = 8765,
) -> int:
    """Show jobs with live progress, plans, models, tasks and reports in a browser, until stopped. Read-only.

    Listens on this machine alone unless told otherwise; then SKIPPLAN_DASHBOARD_TOKEN has to hold a token, which
    browsers are asked for and API clients send as a bearer token. The JSON API is described in /openapi.json.

    [bold]Example:[/bold] skipplan dashboard --port 8080
    """
    from optimizer.dashboard.access import check_token
    from optimizer.errors import UsageFault

    token = os.environ.get("SKIPPLAN_DASHBOARD_TOKEN") or None
    check_token(host, token)
    with open_database(context) as db:
        import socket

        import uvicorn

        from optimizer.dashboard.app import create_app

        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((host.strip("[]"), port))
            except OSError as error:
                raise UsageFault(f"--host {host} --port {port}: cannot listen there: {error.strerror}") from None
            where = f"[{host.strip('[]')}]" if ":" in host else host
            typer.echo(f"dashboard of {db.safe_url} at http://{where}:{port}/ (Ctrl-C stops it)", err=True)
            settings = uvicorn.Config(create_app(db, host=host, token=token), log_level="warning", access_log=False)
            uvicorn.Server(settings).run(sockets=[listener])
    return 0
