"""The space of plans of a job: the actions each layer may take, with or without compensation, after all limits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product

from optimizer.errors import UsageFault
from optimizer.job.spec import JobSpec
from workers.messages import NO_COMPENSATION, WorkerInfo
from workers.runtime import Action, SkipPlan
from workers.runtime.gaps import gaps

RUN, SKIP = Action.RUN.letter, Action.SKIP.letter
COMPENSATED = "C"
"""In genomes, a skip whose gap is compensated: the same action as a skip in a plan."""

MOST_LISTED = 1 << 17
"""A space of at most so many plans can be gone through one by one."""


@dataclass(frozen=True, order=True)
class Candidate:
    """A plan and how its gaps are compensated: ``"none"``, or the canonical text of a recipe."""

    plan: SkipPlan
    compensation: str = NO_COMPENSATION

    @property
    def is_dense(self) -> bool:
        return self.plan.is_dense

    def __str__(self) -> str:
        return self.plan.text if self.compensation == NO_COMPENSATION else f"{self.plan} ({self.compensation})"


@dataclass(frozen=True)
class PlanSpace:
    """Letters allowed per layer (``R`` first everywhere) and the most layers that may differ from ``R``.

    ``compensations`` holds ``"none"``, one recipe's text, or both. Samplers work on genomes: a plan's text in which a
    compensated skip is ``C``; the gaps of one plan are compensated all or none. Plans that skip no layer but leave out
    parts of some are compensated where the space has no others.
    """

    letters: tuple[str, ...]
    max_touched: int
    compensations: tuple[str, ...] = (NO_COMPENSATION,)
    whole: tuple[str, ...] = ()
    """Compensations of the space that this one is a part of, if it is one."""

    @property
    def num_layers(self) -> int:
        return len(self.letters)

    @property
    def free_layers(self) -> tuple[int, ...]:
        """Layers that have a choice."""
        return tuple(layer for layer, letters in enumerate(self.letters) if len(letters) > 1)

    @property
    def size(self) -> int:
        """Number of plans, the limit on touched layers and compensation left aside."""
        return math.prod(len(letters) for letters in self.letters)

    @property
    def has_plain(self) -> bool:
        """Whether gaps may be left as they are, here or elsewhere in the space that this one is a part of."""
        return NO_COMPENSATION in (self.whole or self.compensations)

    @property
    def recipe(self) -> str | None:
        """The recipe of compensated plans, if the job has any."""
        return next((each for each in self.compensations if each != NO_COMPENSATION), None)

    @cached_property
    def genome_letters(self) -> tuple[str, ...]:
        """Per layer the letters of genomes: ``S`` where plain skips are in the space, ``C`` where compensated are.

        Layer 0 is never skipped with compensation: no layer stands before it that could hold the map.
        """
        plain = SKIP if NO_COMPENSATION in self.compensations else ""
        compensated = COMPENSATED if self.recipe else ""
        return tuple(
            letters.replace(SKIP, plain + compensated if layer else plain) for layer, letters in enumerate(self.letters)
        )

    def genome(self, candidate: Candidate) -> str:
        """Return the genome of a candidate."""
        text = candidate.plan.text
        return text if candidate.compensation == NO_COMPENSATION else text.replace(SKIP, COMPENSATED)

    def candidate(self, genome: str) -> Candidate:
        """Return the candidate of a genome."""
        plan = SkipPlan.parse(genome.replace(COMPENSATED, SKIP))
        compensated = COMPENSATED in genome or (not self.has_plain and bool(gaps(plan)))
        return Candidate(plan, self.recipe) if compensated and self.recipe is not None else Candidate(plan)

    def allows(self, genome: str) -> bool:
        """Whether a text is the genome of a candidate of this space."""
        if len(genome) != self.num_layers or (SKIP in genome and COMPENSATED in genome):
            return False
        if genome.count(SKIP) + genome.count(COMPENSATED) == len(genome):
            return False  # a model without any layer left is no model
        within = all(letter in own for letter, own in zip(genome, self.genome_letters, strict=True))
        return within and len(genome) - genome.count(RUN) <= self.max_touched

    def __contains__(self, candidate: Candidate) -> bool:
        genome = self.genome(candidate)
        # A plan that both compensations leave alike is said in one way.
        return self.allows(genome) and self.candidate(genome) == candidate

    @property
    def is_listed(self) -> bool:
        """Whether the space is small enough to be gone through one by one."""
        return self.size * len(self.compensations) <= MOST_LISTED

    @property
    def parts(self) -> tuple[PlanSpace, ...]:
        """The space by compensation: the skips of one plan are compensated all or none."""
        return tuple(
            PlanSpace(self.letters, self.max_touched, (own,), self.compensations) for own in self.compensations
        )

    def enumerate(self) -> Iterator[Candidate]:
        """Every candidate once, the last layers varying fastest; those of one compensation after those of the other."""
        for number, part in enumerate(self.parts):
            for letters in product(*part.genome_letters):
                genome = "".join(letters)
                # Plans without a skip are the same under every compensation.
                if self.allows(genome) and (number == 0 or COMPENSATED in genome or SKIP in genome):
                    yield self.candidate(genome)


def touched(plan: SkipPlan) -> int:
    """Count the layers that do other than run."""
    return sum(action is not Action.RUN for action in plan)


def plan_space(spec: JobSpec, worker: WorkerInfo, compensations: tuple[str, ...] | None = None) -> PlanSpace:
    """Return a job's space on a model, where gaps may be compensated as ``compensations`` or the specification say.

    Raises UsageFault when a protected layer does not exist or nothing is left.
    """
    for layer in spec.protect:
        if layer >= worker.num_layers:
            raise UsageFault(f"protect: layer {layer} does not exist, the model has layers 0..{worker.num_layers - 1}")
    letters = tuple(
        RUN if layer in spec.protect else "".join(letter for letter in spec.letters if letter in allowed)
        for layer, allowed in enumerate(worker.allowed_actions)
    )
    if all(own == RUN for own in letters):
        raise UsageFault(f"actions: no layer of the model may take any of {', '.join(spec.actions)}")
    return PlanSpace(
        letters, spec.constraint.max_layers_touched or worker.num_layers, compensations or spec.compensation.choices()
    )
