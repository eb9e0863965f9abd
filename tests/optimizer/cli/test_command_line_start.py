"""The command line answers at once: nothing heavy is imported before a command runs."""

import os
import resource
import subprocess
import sys
from importlib import metadata

HEAVY = ("torch", "ray", "transformers", "pandas", "sqlalchemy", "optuna", "numpy", "pydantic")


def test_importing_the_command_line_loads_nothing_heavy():
    code = f"import sys, optimizer.cli.main; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_takes_less_than_half_a_second():
    command = [sys.executable, "-m", "optimizer.cli.main", "--help"]
    # A fresh environment compiles bytecode once; where that is switched off, every start would pay for it.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    subprocess.run(command, capture_output=True, check=True, env=env)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and "export" in done.stdout
    # Processor time, which other processes on the machine do not stretch.
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 0.5


def test_version_is_the_installed_one():
    command = [sys.executable, "-m", "optimizer.cli.main", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"skipplan {metadata.version('skipplan')}\n"


def test_help_of_every_command():
    for command in ("run", "export", "db"):
        done = subprocess.run(
            [sys.executable, "-m", "optimizer.cli.main", command, "--help"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0 and "Usage: skipplan" in done.stdout and done.stderr == ""
