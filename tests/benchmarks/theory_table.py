"""Turn reports of ``skipplan validate-theory --output`` into the Markdown tables of docs/theory.md.

python tests/benchmarks/theory_table.py llava-12.json smollm2-30.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def agreement(found: dict[str, Any] | None) -> str:
    if found is None or found["rho"] is None:
        return "-"
    if found["low"] is None:
        return f"{found['rho']:+.2f}"
    return f"{found['rho']:+.2f} [{found['low']:+.2f}, {found['high']:+.2f}]"


def correlations(report: dict[str, Any]) -> list[str]:
    actions = report["actions"]
    lines = ["| criterion | " + " | ".join(f"{each['action']}, KL" for each in actions) + " | "]
    lines[0] += " | ".join(f"{each['action']}, accuracy" for each in actions) + " |"
    lines.append("|---" * (1 + 2 * len(actions)) + "|")
    for name in actions[0]["risks"]:
        cells = [agreement(each["by_kl"].get(name)) for each in actions]
        cells += [agreement(each["by_accuracy"].get(name)) for each in actions]
        shown = f"**{name}**" if name == report["criterion"] else name
        lines.append(f"| {shown} | " + " | ".join(cells) + " |")
    return lines


def sets(report: dict[str, Any]) -> list[str]:
    lines = ["| action | chosen by | layers | accuracy | difference (points) | KL |", "|---" * 6 + "|"]
    names = {"F": "freeze", "B": "bypass", "S": "skip"}
    for each in report["sets"]:
        harm = each["harm"]
        layers = " ".join(map(str, each["layers"]))
        if harm is None:
            lines.append(f"| {names[each['action']]} | {each['kind']} | {layers} | cannot be run | | |")
            continue
        low, high = 100 * harm["difference_low"], 100 * harm["difference_high"]
        difference = f"{100 * harm['difference']:+.1f} [{low:+.1f}, {high:+.1f}]"
        divergence = "-" if harm["kl"] is None else f"{harm['kl']:.2g}"
        cells = (names[each["action"]], each["kind"], layers, f"{harm['accuracy']:.3f}", difference, divergence)
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def behind(report: dict[str, Any]) -> list[str]:
    """Where the default is not at least as good as published criteria, by rho with KL (else with accuracy)."""
    found = []
    for action in report["actions"]:
        rhos = {name: each["rho"] for name, each in (action["by_kl"] or action["by_accuracy"]).items()}
        own = rhos.get(report["criterion"])
        for rival in ("block-influence", "angular", "cosine"):
            if own is not None and rhos.get(rival) is not None and rhos[rival] > own:
                found.append(f"- {action['action']}: {rival} {rhos[rival]:+.2f}, {report['criterion']} {own:+.2f}")
    return found or ["- nowhere"]


def main() -> None:
    for path in sys.argv[1:]:
        report = json.loads(Path(path).read_text())
        print(f"### {report['model']} on {report['task']}\n")
        print(
            f"{report['calibration_samples']} calibration and {report['held_out_samples']} held-out samples of "
            f"{report['held_out_images']} images; dense accuracy {report['dense_accuracy']:.3f}; "
            f"{report['confidence']:.0%} intervals.\n"
        )
        print("\n".join(correlations(report)))
        print(f"\nWhere {report['criterion']} is behind Block Influence, angular distance or cosine:\n")
        print("\n".join(behind(report)))
        print(f"\n{report['set_size']} layers at once:\n")
        print("\n".join(sets(report)), "\n")


if __name__ == "__main__":
    main()
