"""Choose the path that evaluates a request: the fast one where it is exact, else the plain one, with the reason."""

from __future__ import annotations

from dataclasses import replace

from workers.errors import TaskError
from workers.evaluation.passages import PassageEvaluator
from workers.evaluation.plain import PlainEvaluator
from workers.evaluation.shared.fast import FastEvaluator
from workers.evaluation.shared.fast_passages import FastPassageEvaluator
from workers.layerwise.decoder import NotExactError
from workers.messages import NO_COMPENSATION, EvaluatePlans, Evaluations
from workers.runtime.descriptor import UnsupportedFamilyError


class EvaluationDispatch:
    """Evaluate by the fast evaluator of one model and task (or text) where it is exact, else by the plain one.

    Whether it is exact is found out once per split: the model's layers, the task's answers and its prompts are checked,
    and the scores of a few samples compared under the dense and under a mixed plan.
    """

    def __init__(self, plain: PlainEvaluator | PassageEvaluator, *, memory_bytes: int) -> None:
        self.plain = plain
        self._memory = memory_bytes
        self._fast: FastEvaluator | FastPassageEvaluator | None = None
        self._reasons: dict[str, str] = {}
        """By split, why the fast path is not taken; empty where it is."""
        self._by_acceptance: EvaluationDispatch | None = None
        self._targets: dict[str, tuple[int, ...] | None] = {}

    def evaluate(self, request: EvaluatePlans) -> Evaluations:
        """Score the plans of a request.

        Raises:
            TaskError: no such split, or text is to be scored by acceptance.
            NotExactError: the fast path is demanded where it is not exact.
        """
        plain = self.plain
        plain.task.split(request.split)
        if request.targets and isinstance(plain, PassageEvaluator):
            raise TaskError(f"{plain.task.name}: general text has no answers, by whose acceptance plans are scored")
        if request.targets and isinstance(plain, PlainEvaluator) and plain.targets is None:
            samples = plain.task.split(request.split)[request.start : request.n_samples]
            targets = {each.id: target for each, target in zip(samples, request.targets, strict=True)}
            return self._with(plain, targets).evaluate(request)
        plain.compensator.text = request.text
        found = self._evaluate(request)
        if request.compensation == NO_COMPENSATION or any(request.artifacts):
            return found
        return replace(found, failed_calibration=plain.compensator.failed_samples)

    def _with(self, plain: PlainEvaluator, targets: dict[str, tuple[int, ...] | None]) -> EvaluationDispatch:
        """Return what evaluates by acceptance; what was computed for other targets of the samples is forgotten."""
        known = self._targets
        if self._by_acceptance is None or any(known.get(sample, own) != own for sample, own in targets.items()):
            self._targets = {}
            self._by_acceptance = EvaluationDispatch(plain.with_targets(self._targets), memory_bytes=self._memory)
        self._targets.update(targets)
        return self._by_acceptance

    def _evaluate(self, request: EvaluatePlans) -> Evaluations:
        if request.path == "plain":
            return self.plain.evaluate_all(request)
        reason = self._reason(request.split)
        if not reason:
            try:
                assert self._fast is not None
                return self._fast.evaluate_all(request)
            except NotExactError as error:
                reason = self._reasons[request.split] = str(error)
        if request.path == "fast":
            raise NotExactError(f"evaluation: fast is not exact here, use auto or plain: {reason}")
        result = self.plain.evaluate_all(request)
        return Evaluations(result.results, note=f"evaluations share no work: {reason}")

    def _reason(self, split: str) -> str:
        if split not in self._reasons:
            try:
                self._fast = self._fast or self._make_fast()
                self._fast.check(split)
                self._reasons[split] = ""
            except (NotExactError, UnsupportedFamilyError) as error:
                self._reasons[split] = str(error)
        return self._reasons[split]

    def _make_fast(self) -> FastEvaluator | FastPassageEvaluator:
        if isinstance(self.plain, PassageEvaluator):
            return FastPassageEvaluator(self.plain, memory_bytes=self._memory)
        return FastEvaluator(self.plain, memory_bytes=self._memory)
