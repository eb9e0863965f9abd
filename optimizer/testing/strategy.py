"""Contract of search strategies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from optimizer.criteria import Risk
from optimizer.job.sections import ConstraintSpec, SearchSpec
from optimizer.search.budget import Budget
from optimizer.search.constraints import Limits
from optimizer.search.latency import LayerCounts, latency_ratio
from optimizer.search.loop import Search
from optimizer.search.problem import Answer, Ask, Problem, Strategy
from optimizer.search.space import Candidate, PlanSpace
from optimizer.search.trial import Scores, SearchOutcome, Trial
from optimizer.testing.require import made_up_table, require
from workers.messages import NO_COMPENSATION
from workers.runtime.plan import LETTERS, SAVING_LETTERS

LAYERS = 5
SAMPLES = 40
TRIALS = 12


def check_strategy(factory: Callable[[Problem], Strategy]) -> None:
    """Check a strategy's function on a problem of five layers with every action, with and without compensation.

    - ``start`` comes first, then ``ask`` and ``tell`` in turn; the strategy keeps to what ``Strategy`` promises: at
      most as many new candidates as were asked for, all of them of the problem's space, on rungs of the problem.
    - It goes on when evaluations fail, and gives a reason when it has nothing more to ask for.
    - Equal problems with equal answers give equal searches.
    """
    first = _search(factory, failing=True)
    require(len(first.trials) + len(first.failed) > 1, "something is evaluated beside the dense model")
    require(first == _search(factory, failing=True), "equal problems with equal answers give equal searches")
    _search(factory, failing=False)


def made_up_problem() -> Problem:
    """Make a small problem in which later layers do more harm."""
    harm = tuple(0.01 * (layer + 1) for layer in range(LAYERS))
    limits = Limits(ConstraintSpec(max_accuracy_drop=0.2))
    return Problem(
        space=PlanSpace((LETTERS,) * LAYERS, LAYERS, (NO_COMPENSATION, "linear")),
        limits=limits,
        ratio=partial(latency_ratio, LayerCounts.of(LAYERS, LETTERS)),
        rungs=(SAMPLES // 4, SAMPLES),
        risk=Risk("made up", dict.fromkeys(SAVING_LETTERS, harm)),
        table=made_up_table(LAYERS),
        batch=4,
    )


def _search(factory: Callable[[Problem], Strategy], failing: bool) -> SearchOutcome:
    problem = made_up_problem()
    spec = SearchSpec(trials=TRIALS, rungs=problem.rungs[:-1], batch=problem.batch)
    strategy = _Watched(factory(problem), problem)
    evaluate = partial(_evaluate, failing=failing)
    outcome = Search(problem, strategy, Budget(spec, lambda: 0.0), evaluate=evaluate).run()
    require(bool(outcome.stopped_because), "a strategy that asks for nothing says why")
    return outcome


def _evaluate(requests: Sequence[tuple[Candidate, int]], failing: bool) -> Iterator[tuple[Candidate, Scores]]:
    """Answer as many samples wrongly as layers are touched, later ones counting more; every fifth plan may fail."""
    for candidate, n_samples in requests:
        weights = [layer + 1 for layer, letter in enumerate(candidate.plan.text) if letter in SAVING_LETTERS]
        if failing and sum(weights) % 5 == 4:
            yield candidate, Scores((), failure="made to fail")
            continue
        right = [float(sample % 24 >= sum(weights)) for sample in range(n_samples)]
        yield candidate, Scores(tuple(right), kl=(0.01 * sum(weights),) * n_samples)


class _Watched:
    """Pass on to a strategy what the loop says, and check its answers."""

    def __init__(self, inner: Strategy, problem: Problem) -> None:
        self._inner, self._problem = inner, problem
        self._asked: list[Candidate] = []
        self._known: set[Candidate] = set()

    @property
    def done(self) -> str:
        return self._inner.done

    @property
    def expected_gain(self) -> float | None:
        gain = self._inner.expected_gain
        require(gain is None or gain >= 0.0, "an expected gain is a share, or None")
        return gain

    def start(self, dense: Trial) -> None:
        self._known.add(dense.candidate)
        self._inner.start(dense)

    def ask(self, count: int) -> Sequence[Ask]:
        asked = self._inner.ask(count)
        self._asked = [each.candidate for each in asked]
        new = set(self._asked) - self._known
        require(len(new) <= count, f"at most {count} new candidates were asked for, not {len(new)}")
        require(all(each in self._problem.space for each in self._asked), "candidates are of the problem's space")
        rungs = (None, *self._problem.rungs)
        require(all(each.n_samples in rungs for each in asked), "samples are those of a rung, or left to the loop")
        self._known |= new
        return asked

    def tell(self, answers: Sequence[Answer]) -> None:
        require([each for each, _ in answers] == self._asked, "answers come in the order asked")
        self._inner.tell(answers)
