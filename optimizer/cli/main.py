"""The ``skipplan`` command: its options, and how errors become one line and an exit code."""

from __future__ import annotations

import os
import re
import sys
from importlib import metadata
from itertools import islice
from typing import Annotated

import typer

from optimizer.cli import database, export, jobs, plans, report, run, setup, theory, tokens
from optimizer.cli.options import GlobalOptions

FLAGS = ("--debug", "--quiet")

app = typer.Typer(
    name="skipplan",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Find, prove and export which work of a vision-language model can be skipped.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"skipplan {metadata.version('skipplan')}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    database_url: Annotated[
        str | None,
        typer.Option(
            "--database",
            metavar="URL",
            help="Where jobs and plans are kept; overrides SKIPPLAN_DATABASE and the job file.",
        ),
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="Hide progress; errors and results are still printed.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options of the program; all but ``--version`` may stand behind a command's name as well."""
    context.obj = GlobalOptions(database=database_url, debug=debug, quiet=quiet)


SUPERVISED = ("run", "serve", "redundancy", "validate-theory")
"""Commands that use Ray, which may end their process."""

for module in (run, plans, export, report, setup, theory):
    app.add_typer(module.app)
app.add_typer(jobs.app, name="jobs")
app.add_typer(database.app, name="db")
app.add_typer(tokens.app, name="tokens")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code.

    A database URL that holds a password is not left among the arguments: everybody on the machine can read those of a
    process, and Ray keeps them with the cluster's jobs. The command begins anew with the URL in the environment.
    Commands that use Ray run in a child process, which is supervised.
    """
    given = sys.argv[1:] if arguments is None else arguments
    program, command = _split(given)
    url = next((each.removeprefix("--database=") for each in reversed(program) if "://" in each), "")
    interpreter = sys.orig_argv[1 : len(sys.orig_argv) - len(given)]
    if arguments is None and re.search(r"://[^/]*:[^/]*@|password=", url):
        rest = [*(each for each in program if each in FLAGS), *command]
        os.execve(sys.executable, [sys.executable, *interpreter, *rest], {**os.environ, "SKIPPLAN_DATABASE": url})
    supervised = arguments is None and command[:1] in ([each] for each in SUPERVISED) and "--help" not in command
    if supervised:
        from optimizer.service import channel

        if not channel.open_channel():
            from optimizer.service.supervisor import Supervisor

            child = [sys.executable, *interpreter, *given]
            raise SystemExit(Supervisor(child, restarts=command[0] == "serve").run())
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' bars too: nobody would see them move
    code = _run([*program, *command])
    if supervised:
        channel.tell(orderly=True)
    raise SystemExit(code)


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Part the program's own options, which may stand anywhere before a ``--``, from the command's arguments."""
    program: list[str] = []
    command: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        if argument == "--":
            command += [argument, *waiting]
        elif argument == "--database":
            program += [argument, *islice(waiting, 1)]
        elif argument in FLAGS or argument.startswith("--database="):
            program.append(argument)
        else:
            command.append(argument)
    return program, command


def _run(arguments: list[str]) -> int:
    debug = "--debug" in arguments
    try:
        result = app(arguments, prog_name="skipplan", standalone_mode=False)
    except BrokenPipeError:
        # The reader of a pipe went away (``skipplan plans | head``); nothing more can or should be said.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except typer.Exit as stop:
        return stop.exit_code
    except typer.Abort:
        return _report(130, "interrupted")
    except BaseException as error:
        if debug and not isinstance(error, SystemExit):
            import traceback

            traceback.print_exc()
        return _explain(error)
    return result if isinstance(result, int) else 0


def _explain(error: BaseException) -> int:
    from optimizer.errors import explain
    from workers.text import one_line

    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    known = explain(error)
    if known is not None:
        return _report(known[0], "\n  ".join([known[1], *getattr(error, "details", ())]))
    if isinstance(error, typer.TyperException):
        message = _suggested(one_line(error.format_message())) or "a command is needed; see skipplan --help"
        return _report(error.exit_code, message)
    return _report(
        1, f"unexpected {type(error).__name__}: {one_line(error)} (run again with --debug for the traceback)"
    )


def _suggested(message: str) -> str:
    """Add what a misspelt choice was probably meant to be."""
    from workers.text import did_you_mean

    message = message.replace(": Value error, ", ": ")
    option = re.match(r"No such option: (--\S+)", message)  # the command at hand knows nothing of the global ones
    if option is not None and (close := did_you_mean(option[1], ("--database", *FLAGS))):
        return option[0] + close
    wrong = re.search(r"'([^']*)' is not one of (.*)", message)
    if wrong is None:
        return message
    return message.rstrip(".") + did_you_mean(wrong[1], re.findall(r"'([^']*)'", wrong[2]))


def _report(code: int, message: str) -> int:
    sys.stderr.write(f"skipplan: {message}\n")
    return code


if __name__ == "__main__":
    main()
