"""The command line answers at once: nothing heavy is imported before a command runs."""

import statistics
import subprocess
import sys
import time

HEAVY = ("torch", "ray", "transformers", "pandas", "sqlalchemy", "optuna", "numpy", "pydantic")


def test_importing_the_command_line_loads_nothing_heavy():
    code = f"import sys, optimizer.cli.main; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_takes_less_than_half_a_second():
    taken = []
    for _ in range(5):
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "optimizer.cli.main", "--help"], capture_output=True, text=True, check=False
        )
        taken.append(time.perf_counter() - started)
        assert done.returncode == 0 and "export" in done.stdout
    assert min(taken) < 0.5, taken  # the least disturbed of five
    print(f"median {statistics.median(taken):.2f} s")


def test_help_of_every_command():
    for command in ("run", "submit", "serve", "best", "plans", "export", "jobs", "db"):
        done = subprocess.run(
            [sys.executable, "-m", "optimizer.cli.main", command, "--help"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0 and "Usage: skipplan" in done.stdout and done.stderr == ""
