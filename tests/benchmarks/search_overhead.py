"""Time the driver takes per proposal: python tests/benchmarks/search_overhead.py

A study of so many finished trials of random plans near a planted front; then batches are proposed and reported.
It prints processor time per proposal, the study's own bookkeeping included, and proposals that were made twice.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests" / "helpers")]

import numpy as np  # noqa: E402
from planted import problem_of, random_problem  # noqa: E402

from optimizer.job.sections import ConstraintSpec, SearchSpec  # noqa: E402
from optimizer.registries import STRATEGIES  # noqa: E402
from optimizer.search.space import Candidate  # noqa: E402
from optimizer.search.trial import Trial, trial_of  # noqa: E402
from workers.runtime import SkipPlan  # noqa: E402
from workers.runtime.plan import LETTERS  # noqa: E402

CASES = (
    (30, "RFBS", 200, 50.0),
    (30, "RFBS", 1000, 50.0),
    (30, LETTERS, 1000, 50.0),
    (80, "RFBS", 1000, 250.0),
    (80, LETTERS, 1000, 250.0),
)
"""Layers, actions, finished evaluations, bar in milliseconds."""
BATCHES = 5


def overhead(layers: int, letters: str, evaluations: int) -> tuple[float, int, int]:
    """Milliseconds per proposal, the median of some batches; proposals, and how many of them were known plans."""
    planted = random_problem(layers, letters, 1)
    spec = SearchSpec(trials=evaluations + 100, rungs=(100,))
    problem = problem_of(planted, letters, spec=spec, constraint=ConstraintSpec(max_accuracy_drop=0.2), seeded=False)
    strategy = STRATEGIES["surrogate"](problem)
    dense = Candidate(SkipPlan.dense(layers))
    scores = planted.scores(dense, planted.samples)

    def seen(candidate: Candidate) -> Trial:
        figures = planted.scores(candidate, planted.samples)
        return trial_of(candidate, figures, scores, problem.ratio(candidate.plan), planted.samples)

    random = np.random.default_rng(0)
    strategy.start(seen(dense))
    known = {dense}
    while len(known) < evaluations:
        share = random.uniform(0.0, 0.5)
        drawn = [letters[random.integers(1, len(letters))] if random.random() < share else "R" for _ in range(layers)]
        candidate = Candidate(SkipPlan.parse("".join(drawn)))
        if candidate not in known:
            known.add(candidate)
            strategy.begin_with([candidate])
            (ask,) = strategy.ask(1)
            strategy.tell([(ask.candidate, seen(ask.candidate))])
    times: list[float] = []
    proposed = 0
    before = len(strategy._study.trials)
    for _ in range(BATCHES):
        started = time.process_time()
        asked = strategy.ask(spec.batch)
        spent = time.process_time() - started
        answers = [(ask.candidate, seen(ask.candidate)) for ask in asked]
        started = time.process_time()
        strategy.tell(answers)
        times.append(1000 * (spent + time.process_time() - started) / len(asked))
        proposed += len(asked)
    made = len(strategy._study.trials) - before
    return float(np.median(times)), made, made - proposed  # known plans are asked for once more, and failed


def main() -> None:
    print("| layers | actions | evaluations | ms per proposal | bar | proposals | known before |")
    print("|---|---|---|---|---|---|---|")
    for layers, letters, evaluations, bar in CASES:
        milliseconds, made, known = overhead(layers, letters, evaluations)
        figures = f"{evaluations} | {milliseconds:.1f} | {bar:.0f} | {made} | {known}"
        print(f"| {layers} | {letters} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
