"""Where a job's search begins: the criterion's plans, published methods' plans, plans of other tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from optimizer.errors import UsageFault
from optimizer.job.sections import SearchSpec
from optimizer.search.problem import Problem
from optimizer.search.seeds.blocks import unexplained_shares
from optimizer.search.seeds.nested import nested_sets
from optimizer.search.seeds.theory import Seeds, random_seeds, theory_seeds
from optimizer.search.space import Candidate
from optimizer.search.strategies.published import published_chains
from optimizer.search.trial import Trial
from workers.messages import NO_COMPENSATION
from workers.runtime import SkipPlan


def with_seeds(
    problem: Problem, spec: SearchSpec, known: Sequence[Trial] = (), elsewhere: Sequence[Candidate] = ()
) -> Problem:
    """Return the problem with its seeds; ``known`` are earlier evaluations, ``elsewhere`` good plans of other tasks.

    The project's own sampler judges most seeds before it evaluates them; Optuna's samplers get them as first trials,
    for at most half of the trials. Where the criterion is trusted less, random plans take the place of its own.
    """
    if spec.seeds == "none":
        return replace(problem, known=tuple(known))
    elsewhere = [each for each in elsewhere if each in problem.feasible]
    if spec.strategy == "surrogate":
        seeds = _seeds(problem, spec, known)
        first = [*elsewhere[: problem.batch // 2], *seeds.first]
        return replace(
            problem,
            seeds=tuple(dict.fromkeys(first)),
            reserve=tuple(dict.fromkeys([*elsewhere, *seeds.reserve])),
            chains=seeds.chains,
            bisections=round(problem.trust * (spec.trials // 2)),
            known=tuple(known),
        )
    most = max(1, spec.trials // 2)
    if spec.seeds == "random":
        return replace(problem, seeds=random_seeds(problem.feasible, most, problem.seed).first, known=tuple(known))
    nested = [each for each in nested_sets(problem.space, problem.risk) if each in problem.feasible]
    own = nested[: round(problem.trust * most)]
    others = () if problem.trust == 1 else random_seeds(problem.feasible, most, problem.seed).first
    return replace(problem, seeds=tuple(dict.fromkeys([*elsewhere, *own, *others]))[:most], known=tuple(known))


def with_given(problem: Problem, plans: Sequence[str]) -> Problem:
    """Return the problem with these plans, under every compensation that it allows, before all other seeds.

    Raises UsageFault for a plan that is not in the problem's space.
    """
    given = []
    for text in plans:
        plan = SkipPlan.parse(text)
        candidates = [Candidate(plan, own) for own in dict.fromkeys([NO_COMPENSATION, *problem.space.compensations])]
        inside = [candidate for candidate in candidates if candidate in problem.space]
        if not inside:
            raise UsageFault(
                f"search.plans: {text} is no plan of this job: its {problem.space.num_layers} layers take the job's "
                "actions, where they are not protected"
            )
        given += inside
    return replace(problem, seeds=tuple(dict.fromkeys([*given, *problem.seeds])))


def _seeds(problem: Problem, spec: SearchSpec, known: Sequence[Trial]) -> Seeds:
    """Return the surrogate's seeds: some random plans, fewer where much is known, and chains to bisect."""
    if spec.seeds == "random":
        return random_seeds(problem.feasible, problem.batch, problem.seed)
    theory = theory_seeds(
        problem.space,
        problem.risk,
        problem.feasible,
        unexplained=unexplained_shares(problem.table),
        published=published_chains(problem),
    )
    # A surrogate that has only seen what the theory holds safe cannot tell where it errs.
    others = random_seeds(problem.feasible, problem.batch, problem.seed).first
    return replace(theory, first=others[: max(0, problem.batch - len(known)) // 4])
