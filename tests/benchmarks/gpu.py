"""Check and measure on a GPU what tests on a CPU cannot: ``make gpu``.

    PYTHONPATH=.:tests/helpers:tests/benchmarks python tests/benchmarks/gpu.py
    PYTHONPATH=.:tests/helpers:tests/benchmarks python tests/benchmarks/gpu.py --dry-run   # small shapes, on the CPU

The work is cut into pieces of at most nine minutes, each in a process of its own. After each its figures are in
``--results``; run again, it goes on with those that are missing, failed, or were stopped (a job goes on where it was).
With ``--page`` the results are written as a page, also where there are none.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gpu_pieces import pieces

SCRIPT = Path(__file__).with_name("gpu_pieces.py")
ENDED = ("done", "absent")

HEAD = """\
# Benchmarks on a GPU

`make gpu` makes this page on a machine with a GPU (`make install-test DEVICE=gpu` before). It checks what the tests on
a CPU cannot, and measures, in pieces of at most nine minutes, with results kept in `gpu.json`. Run again, it goes on
with what is missing. `--dry-run` runs the same code on small shapes on a CPU. Models of 7B shapes have random weights:
their times and memory mean something, their scores do not. With `PYTHONPATH=.:tests/helpers:tests/benchmarks`:

| command | does |
|---|---|
| `python tests/benchmarks/gpu.py --page docs/benchmarks-gpu.md` | all pieces; `make gpu` |
| `python tests/benchmarks/gpu.py --only "prefill"` | those whose name begins so |
| `python tests/benchmarks/gpu_pieces.py "prefill llava-7b" --directory gpu` | one, in this process |
| `python tests/benchmarks/gpu.py --dry-run` | all, on small shapes on the CPU |
"""


def read(path: Path) -> dict[str, Any]:
    """Read the results so far."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"machine": "", "pieces": {}}
    return found


def write(path: Path, results: dict[str, Any]) -> None:
    """Replace the file at once, so that a kill leaves the former or the new one."""
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(results, indent=2) + "\n")
    beside.replace(path)


def run(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one piece in a process of its own, for so long at most."""
    place = ["--device", "cpu", "--tiny"] if options.dry_run else ["--device", "cuda"]
    command = [sys.executable, str(SCRIPT), name, *place, "--directory", str(options.directory)]
    began = time.monotonic()
    environment = dict(os.environ)
    if options.dry_run:  # its times mean nothing: it waits for no other program's locks on the processor
        environment |= {"TMPDIR": str(options.directory.resolve()), "RAY_TMPDIR": "/tmp"}
        options.directory.mkdir(parents=True, exist_ok=True)
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, **pipes, env=environment, process_group=0)
    try:
        output, errors = process.communicate(timeout=options.seconds)
        lines = output.strip().splitlines()
        found = json.loads(lines[-1]) if process.returncode == 0 and lines else None
        if found is None:
            found = {"state": "failed", "reason": (errors.strip() or "no reason").splitlines()[-1]}
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 15)  # a job is put back, and goes on the next time
        process.communicate()
        found = {"state": "stopped", "reason": f"not done within {options.seconds:g} s"}
    return found | {"seconds": time.monotonic() - began, "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M")}


def machine() -> str:
    """Name the device and the versions."""
    import torch
    import transformers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{device}, torch {torch.__version__}, transformers {transformers.__version__}"


def page(results: dict[str, Any]) -> str:
    """Write all pieces as a table, those without results too."""
    lines = [HEAD]
    lines.append(f"Machine: {results['machine'] or 'none yet: nothing has been measured'}.\n")
    lines += ["| piece | state | figures |", "|---|---|---|"]
    for name in pieces():
        found = results["pieces"].get(name)
        if found is None:
            lines.append(f"| `{name}` | not run | |")
            continue
        figures = ", ".join(f"{key} {_short(value)}" for key, value in found.get("figures", {}).items())
        state = f"{found['state']}, {found['date']}, {found['seconds']:.0f} s"
        lines.append(f"| `{name}` | {state} | {(figures or found.get('reason', '')).replace('|', '/')} |")
    return "\n".join(lines) + "\n"


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "; ".join(value) if isinstance(value, list) else str(value)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="small shapes on the CPU")
    parser.add_argument("--results", type=Path, default=Path("gpu.json"))
    parser.add_argument("--page", type=Path, help="write the results there; alone with --no-run")
    parser.add_argument("--no-run", action="store_true")
    parser.add_argument("--directory", type=Path, default=Path("gpu"), help="for models and the jobs' database")
    parser.add_argument("--only", default="", help="pieces whose name begins so")
    parser.add_argument("--seconds", type=float, default=540.0, help="of each piece")
    options = parser.parse_args(arguments)
    results, failed = read(options.results), 0
    if not options.no_run:
        import torch

        if not options.dry_run and not torch.cuda.is_available():
            parser.exit(1, "gpu.py: torch sees no GPU here; --dry-run runs the pieces on the CPU, on small shapes\n")
        results["machine"] = machine() + (", dry run" if options.dry_run else "")
        for name in [each for each in pieces() if each.startswith(options.only)]:
            if results["pieces"].get(name, {}).get("state") in ENDED:
                continue
            results["pieces"][name] = found = run(name, options)
            write(options.results, results)
            failed += found["state"] not in ENDED
            print(f"{name}: {found['state']} after {found['seconds']:.0f} s {found.get('reason', '')}", flush=True)
    if options.page is not None:
        options.page.write_text(page(results))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
