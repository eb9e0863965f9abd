"""The sizes of a search's rungs, and when the search ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from optimizer.job.sections import SearchSpec


def rung_sizes(rungs: Sequence[int] | None, n_samples: int) -> tuple[int, ...]:
    """Return the prefix sizes of the search split, the last one the whole split.

    The prefixes hold the same samples for every candidate; by default they are a quarter of the split, then all of it.
    """
    sizes = rungs if rungs is not None else (math.ceil(n_samples / 4),)
    return (*(size for size in sizes if size < n_samples), n_samples)


@dataclass
class Budget:
    """Count what a search spends, and say why it must stop.

    Layer executions are counted as if every candidate was evaluated alone (new samples times layers that run, of those
    that run in part their share), so that the count depends neither on which candidates shared work nor on what was
    known before.
    """

    spec: SearchSpec
    elapsed: Callable[[], float]
    """Seconds that the search has taken; see the search stage for what counts."""
    trials: int = 0
    layer_executions: float = 0.0
    _quiet: int = field(default=0, repr=False)

    def spent(self) -> str | None:
        """Why the search must stop, or None."""
        if self.trials >= self.spec.trials:
            return f"the budget of {self.spec.trials} trials is spent"
        limit = self.spec.layer_executions
        if limit is not None and self.layer_executions >= limit:
            return f"the budget of {limit} layer executions is spent"
        if self.spec.seconds is not None and self.elapsed() >= self.spec.seconds:
            return f"the budget of {self.spec.seconds:g} seconds is spent"
        return None

    def left(self) -> int:
        """Count the trials left."""
        return self.spec.trials - self.trials

    def quiet(self, expected_gain: float | None) -> str | None:
        """Why going on is not worth it: for ``patience`` batches in a row too little hypervolume was expected.

        ``expected_gain`` is a share of the front's hypervolume; None where the strategy predicts nothing.
        """
        threshold = self.spec.min_gain
        if threshold is None or expected_gain is None or expected_gain >= threshold:
            self._quiet = 0
            return None
        self._quiet += 1
        if self._quiet < self.spec.patience:
            return None
        return (
            f"the expected gain of the front's hypervolume stayed under {100 * threshold:g} % "
            f"for {self.spec.patience} batches"
        )
