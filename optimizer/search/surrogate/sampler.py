"""The project's own sampler, a real Optuna sampler: it proposes what is expected to enlarge the Pareto front.

A surrogate over single and pair terms of (layer, action), with a mean built on the criterion's risk, is fitted to all
finished trials. Candidates come from the front by single changes, exchanges and crossings, and from seeds held in
reserve, all of them near plans known to meet the limit. Every proposal of a batch is the best of a draw of its own
(damped Thompson sampling), by the hypervolume that it would add; latency is known beforehand and needs no model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from optimizer.search.pareto import Point, front_indices, hypervolume
from optimizer.search.space import RUN
from optimizer.search.surrogate.encoding import Encoding
from optimizer.search.surrogate.loss_model import START, Draws, LossModel, Observations, Stairs
from optimizer.search.surrogate.model import Design
from optimizer.search.surrogate.moves import Moves
from optimizer.search.surrogate.trust_region import TrustRegion

Floats = NDArray[np.float64]

MARGIN = 0.02
"""A second cost that is larger than the job allows by no more than this is worth something: it may be noise."""


@dataclass(frozen=True)
class Settings:
    """How the sampler searches; chosen by the benchmark in docs/benchmarks.md."""

    least_damping: float = 0.3
    most_damping: float = 2.0
    """Factors of the draws' distance from the posterior mean: a batch's draws go from careful to curious."""
    parents: int = 12
    """Plans of the front (and the next-best layers behind it) that moves start from."""
    at_random: int = 1
    """Proposals of a batch that are drawn uniformly from the better part of the pool."""
    better: float = 0.25
    """That part of the pool."""
    pool: int = 500
    """Candidates judged before, and again after, the best of them are moved once more."""
    finalists: int = 6
    """Best candidates per batch that are moved once more."""
    most_observations: int = 600
    """The surrogate learns from at most so many trials: the front's surroundings and the latest."""


@dataclass(frozen=True)
class Space:
    """Space of plans as functions of genomes (a plan's text, ``C`` a compensated skip)."""

    letters: tuple[str, ...]
    """Per layer the letters it may take, ``R`` first."""
    allows: Callable[[str], bool]
    foresee: Callable[[str], tuple[float, bool]]
    """The first cost, and whether every constraint that needs no evaluation is met."""
    draw: Callable[[np.random.Generator], str | None]
    """A random plan that meets these constraints; None where there is none."""
    to_params: Callable[[str], dict[str, Any]]
    from_params: Callable[[Mapping[str, Any]], str]
    distributions: dict[str, BaseDistribution]
    expected: Callable[[Sequence[str], Floats], Floats] | None = None
    """The second cost of plans by their losses, ``[..., plans]``; None where that is the loss itself."""


@dataclass(frozen=True)
class Observation:
    """One finished trial of Optuna's, its values as costs."""

    genome: str
    ratio: float
    cost: float
    loss: float
    loss_error: float
    kl: float
    kl_error: float
    complete: bool


class SurrogateSampler(BaseSampler):
    """Minimise two costs: the latency ratio (a known function of the plan) and the loss of accuracy.

    Of drafters the costs are the extra memory, which is known, and the time per token: a function of a plan and of its
    loss, which is what the surrogate models here too.

    Where trials carry the user attributes ``kl``, ``kl_error`` and ``difference_error``, they are used; ``n_samples``
    tells trials that were stopped early (on fewer samples than the most seen) from complete ones. The loss is minus the
    attribute ``difference``.
    """

    def __init__(
        self,
        space: Space,
        risk: Mapping[str, Sequence[float]],
        largest_cost: float,
        *,
        seed: int,
        batch: int = 8,
        reserve: Sequence[str] = (),
        settings: Settings | None = None,
    ) -> None:
        """``risk[letter][layer]`` is the criterion's; ``largest_cost`` is the most that the second cost may be."""
        self._space, self._settings, self._batch = space, settings or Settings(), batch
        self._random = np.random.default_rng([seed, 0])
        self._encoding = Encoding(space.letters)
        self._moves = Moves(space.letters, space.allows, self._random)
        self._risk = self._unit_risk(risk)
        self._reference = (1.0, largest_cost + MARGIN)
        self._reserve = list(dict.fromkeys(reserve))
        self._trust = TrustRegion(len(space.letters))
        self._under_way: set[str] = set()
        """Proposals, from whose results the trust region has not learnt yet."""
        self._queue: deque[str] = deque()
        self._foresee = cache(space.foresee)
        self._scales, self._fitted_on = START, 0
        self._seen: dict[int, tuple[Observation, float]] = {}
        self._genomes: dict[int, str] = {}
        self.expected_gain: float | None = None

    def _unit_risk(self, risk: Mapping[str, Sequence[float]]) -> Floats:
        """Risk per column, its mean 1."""
        raw = np.array([risk[letter][layer] for layer, letter in self._encoding.columns])
        finite = raw[np.isfinite(raw)]
        raw = np.minimum(raw, 2 * float(finite.max()) if len(finite) else 1.0)  # what could not be measured is risky
        unit: Floats = raw / max(1e-12, float(raw.mean()))
        return unit

    # Optuna's interface ------------------------------------------------------------------------------------------

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._space.distributions

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return the next proposal; a whole batch is made at once, so that its members differ."""
        if not self._queue:
            trials = study.get_trials(deepcopy=False)
            self._queue.extend(self._propose(self._read(trials), self._taken(trials)))
        if not self._queue:
            return {}
        return self._space.to_params(self._queue.popleft())

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Return a parameter that is no layer's, or any when the sampler found nothing new: uniform."""
        choices = getattr(param_distribution, "choices", None)
        if choices is None:
            raise ValueError(f"{param_name}: this sampler proposes categorical parameters only")
        return choices[int(self._random.integers(len(choices)))]

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """Drop the queued proposals, which were made without this result."""
        if state is TrialState.COMPLETE:
            self._queue.clear()

    # Reading trials ----------------------------------------------------------------------------------------------

    def _read(self, trials: Sequence[FrozenTrial]) -> list[Observation]:
        """Finished trials, those of equal plans once (the latest)."""
        for trial in trials:
            if trial.state is TrialState.COMPLETE and trial.number not in self._seen:
                genome = self._space.from_params(trial.params)
                attributes = trial.user_attrs
                ratio, cost = trial.values
                kl, error = attributes.get("kl"), attributes.get("kl_error")
                seen = Observation(
                    genome,
                    float(ratio),
                    float(cost),
                    float(cost) if attributes.get("difference") is None else -float(attributes["difference"]),
                    float(attributes.get("difference_error") or 1e-3),
                    np.nan if kl is None else float(kl),
                    0.0 if error is None else float(error),
                    True,
                )
                self._seen[trial.number] = (seen, float(attributes.get("n_samples") or np.inf))
        most = max((samples for _, samples in self._seen.values()), default=0.0)
        latest = {seen.genome: replace(seen, complete=samples == most) for seen, samples in self._seen.values()}
        return list(latest.values())

    def _taken(self, trials: Sequence[FrozenTrial]) -> set[str]:
        """Plans that are not to be proposed again: evaluated, failed or being evaluated."""
        for trial in trials:
            if trial.number not in self._genomes and trial.params:
                self._genomes[trial.number] = self._space.from_params(trial.params)
        return set(self._genomes.values())

    # Proposing ---------------------------------------------------------------------------------------------------

    def _propose(self, seen: list[Observation], taken: set[str]) -> list[str]:
        good = self._good(seen)
        came = [each.genome in good for each in seen if each.genome in self._under_way]
        if came:
            self._trust.learn(came)
            self._under_way &= taken - {each.genome for each in seen}
        points = [(each.ratio, each.cost) for each in self._front(seen)]
        stairs = Stairs(points, self._reference)
        new = self._first_pool(self._parents(seen), taken)
        pool = self._trust.nearest(new, good)
        if not pool:
            return []
        if len(seen) < 3:
            first = [pool[int(index)] for index in self._random.permutation(len(pool))[: self._batch]]
            self._under_way.update(first)
            return first
        draws = self._draws(seen)
        costs = self._second_costs(seen, pool, draws(self._design(pool)))
        chosen, gains = self._choose(pool, costs, stairs, self._settings.finalists)
        moved = self._trust.within(self._second_pool([pool[index] for index in chosen], taken | set(pool)), good)
        if moved:
            costs = np.hstack([costs, self._second_costs(seen, moved, draws(self._design(moved)))])
        pool += moved
        at_random = min(self._settings.at_random, self._batch - 1)
        chosen, gains = self._choose(pool, costs, stairs, self._batch - at_random)
        volume = hypervolume(points, self._reference)
        self.expected_gain = float(np.mean(gains)) / volume if volume > 0 else None
        rest = [index for index in range(len(pool)) if index not in set(chosen)]
        chosen += self._better_part(rest, pool, costs[0], stairs)[:at_random]
        batch = [pool[index] for index in chosen]
        self._under_way.update(batch)
        return batch

    def _better_part(self, rest: Sequence[int], pool: Sequence[str], mean: Floats, stairs: Stairs) -> list[int]:
        """Plain evolution: members of the better part of the pool in random order, whatever the draws say."""
        if not rest:
            return []
        above = stairs.excess(np.array([self._ratio(pool[index]) for index in rest]), mean[list(rest)])
        better = np.argsort(above, kind="stable")[: max(1, int(self._settings.better * len(rest)))]
        return [rest[int(index)] for index in self._random.permutation(better)]

    def _front(self, seen: Sequence[Observation]) -> list[Observation]:
        complete = [each for each in seen if each.complete and self._feasible(each.genome)]
        return [complete[index] for index in front_indices([(each.ratio, each.cost) for each in complete])]

    def _second_costs(self, seen: Sequence[Observation], pool: Sequence[str], losses: Floats) -> Floats:
        """Return the second costs of plans by their losses ``[draws, plans]``.

        What is expected of losses is corrected by what it makes of those seen.
        """
        if self._space.expected is None:
            return losses
        known = [each for each in seen if each.complete and RUN * len(each.genome) != each.genome]
        expected = self._space.expected([each.genome for each in known], np.array([each.loss for each in known]))
        ratios = np.array([each.cost for each in known]) / expected
        return self._space.expected(pool, losses) * (float(np.median(ratios)) if known else 1.0)

    def _good(self, seen: Sequence[Observation]) -> list[str]:
        """Dense, and the plans that meet the limit on all samples, or nearly."""
        dense = RUN * len(self._space.letters)
        meeting = (each.genome for each in seen if each.complete and each.cost <= self._reference[1])
        return list(dict.fromkeys([dense, *meeting]))

    def _parents(self, seen: Sequence[Observation]) -> list[str]:
        """Return the front, then what would be the front without it, until there are enough."""
        rest = [
            each for each in seen if each.complete and each.cost <= self._reference[1] and self._feasible(each.genome)
        ]
        parents: list[str] = []
        while rest and len(parents) < self._settings.parents:
            indices = set(front_indices([self._costs(each) for each in rest]))
            parents += [rest[index].genome for index in sorted(indices)]
            rest = [each for index, each in enumerate(rest) if index not in indices]
        return parents

    @staticmethod
    def _costs(seen: Observation) -> Point:
        """Equal costs are told apart by their KL: the plan closer to dense has more room left."""
        return (seen.ratio, seen.cost + (0.0 if np.isnan(seen.kl) else 1e-3 * min(1.0, seen.kl)))

    def _first_pool(self, parents: Sequence[str], taken: set[str]) -> list[str]:
        """Return new candidates around the parents and from the reserve, each once, in a fixed order."""
        pool: dict[str, None] = dict.fromkeys(genome for genome in self._reserve if genome not in taken)
        starts = parents or self._drawn_starts()
        near = [genome for parent in starts for genome in self._moves.neighbours(parent)]
        for index in self._random.permutation(len(near))[: self._settings.pool // 2]:
            pool.setdefault(near[int(index)])
        for _ in range(self._settings.pool // 2 if starts else 0):
            genome = self._moved(starts)
            if genome is not None:
                pool.setdefault(genome)
        return [genome for genome in pool if genome not in taken and self._feasible(genome)]

    def _drawn_starts(self) -> list[str]:
        """Where no plan is known to start from: dense, or if that is beyond the constraints, plans within them."""
        dense = RUN * len(self._space.letters)
        if self._feasible(dense):
            return [dense]
        drawn = [self._space.draw(self._random) for _ in range(self._settings.parents)]
        return [genome for genome in drawn if genome is not None]

    def _moved(self, parents: Sequence[str]) -> str | None:
        first = parents[int(self._random.integers(len(parents)))]
        kind = self._random.random()
        if kind < 0.5:
            return self._moves.exchange(first)
        if kind < 0.75:
            return self._moves.change(first, int(self._random.integers(2, 5)))
        if kind < 0.95 or len(self._moves.skip_letters) < 2:
            return self._moves.cross(first, parents[int(self._random.integers(len(parents)))])
        return self._moves.other_skip(first)

    def _second_pool(self, best: Sequence[str], known: set[str]) -> list[str]:
        """Neighbours of the best candidates: two changes away from what was evaluated."""
        near = dict.fromkeys(genome for parent in best for genome in self._moves.neighbours(parent))
        for parent in best:
            for _ in range(self._settings.pool // 20):
                genome = self._moves.exchange(parent)
                if genome is not None:
                    near.setdefault(genome)
        new = [genome for genome in near if genome not in known and self._feasible(genome)]
        return [new[int(index)] for index in sorted(self._random.permutation(len(new))[: self._settings.pool])]

    def _draws(self, seen: Sequence[Observation]) -> Draws:
        kept = self._nearest(seen)
        dense = Observation(RUN * len(self._space.letters), 1.0, 0.0, 0.0, 1e-4, 0.0, 1e-6, True)
        if not any(each.genome == dense.genome for each in kept):
            kept = [dense, *kept]
        observations = Observations(
            self._design([each.genome for each in kept]),
            np.array([each.loss for each in kept]),
            np.array([max(1e-4, each.loss_error) for each in kept]),
            np.array([each.kl for each in kept]),
            np.array([each.kl_error for each in kept]),
        )
        refit = len(kept) >= 1.15 * self._fitted_on or len(kept) < 60
        model = LossModel(self._encoding, observations, self._scales, rounds=2 if refit else 0)
        if refit:
            self._scales, self._fitted_on = model.scales, len(kept)
        damping = np.geomspace(self._settings.least_damping, self._settings.most_damping, self._batch)
        return model.draws(damping, self._random)

    def _nearest(self, seen: Sequence[Observation]) -> list[Observation]:
        """All trials, or where there are too many the ones closest to the front and the latest."""
        most = self._settings.most_observations
        if len(seen) <= most:
            return list(seen)
        stairs = Stairs([(each.ratio, each.cost) for each in self._front(seen)], self._reference)
        above = stairs.excess(np.array([each.ratio for each in seen]), np.array([each.cost for each in seen]))
        order = np.argsort(above, kind="stable")
        kept = set(order[: most * 3 // 4].tolist()) | set(range(len(seen) - most // 4, len(seen)))
        return [seen[index] for index in sorted(kept)]

    def _design(self, genomes: Sequence[str]) -> Design:
        rows = self._encoding.encode(genomes)
        total = rows @ self._risk / len(self._space.letters)
        touched = rows.sum(axis=1) / len(self._space.letters)
        return Design(np.stack([np.ones(len(rows)), total, np.sqrt(total), touched], axis=1), rows)

    def _choose(self, pool: Sequence[str], drawn: Floats, stairs: Stairs, count: int) -> tuple[list[int], Floats]:
        """Return indices of the most promising candidates, one per draw in turn, and the gain each expects."""
        ratios = np.array([self._ratio(genome) for genome in pool])
        # Nothing is taken to be more accurate than the most accurate plan seen: below that lies noise.
        costs = drawn[1:] if self._space.expected is not None else np.maximum(drawn[1:], stairs.lowest)
        gains = stairs.gain(ratios, costs)
        # Where no gain is in sight, what lies least above the front is closest to one.
        scores = np.where(gains > 0, gains, -1.0 - stairs.excess(ratios, costs))
        order = np.argsort(-scores, axis=1, kind="stable")
        chosen: dict[int, float] = {}
        expected = gains.mean(axis=0)
        for rank in range(order.shape[1]):
            for draw in range(order.shape[0]):
                if len(chosen) >= min(count, len(pool)):
                    return list(chosen), np.array(list(chosen.values()))
                index = int(order[draw, rank])
                chosen.setdefault(index, float(expected[index]))
        return list(chosen), np.array(list(chosen.values()))

    def _ratio(self, genome: str) -> float:
        return self._foresee(genome)[0]

    def _feasible(self, genome: str) -> bool:
        return self._foresee(genome)[1]
