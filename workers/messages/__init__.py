"""Requests to workers and their replies: frozen values, from loading to maps and guards.

A request says what to measure, a reply holds what was measured. Everything here pickles small and imports nothing
heavy, so that the driver and the command line can use it without torch. Plans are given by their text, times are in
seconds, memory is in bytes, accuracies and scores lie in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass

from .compensation import (
    NO_COMPENSATION,
    Artifact,
    FitCompensation,
    FittedCompensation,
    GapShare,
    LinearRedundancy,
    MeasureLinearRedundancy,
)
from .engine import CompareEngineLatency, EngineComparison, EngineFound, EngineLevel, EngineTimes, FindEngine
from .evaluation import (
    DEFAULT_BATCH_SIZE,
    AnswerDense,
    CompareText,
    DenseAnswers,
    EvaluateOtherTask,
    EvaluatePlans,
    Evaluation,
    EvaluationFailure,
    Evaluations,
    ShownSample,
    ShownSamples,
    ShowSamples,
    TextDivergence,
)
from .guard import FitGuards, FittedGuard, FittedGuards, SentAway
from .latency import DEFAULT_WORKLOAD, CompareLatency, LatencyComparison, LatencyProfile, ProfileLatency, Workload
from .loading import ModelSource, WorkerInfo
from .redundancy import TOKEN_GROUPS, KindSums, MeasureRedundancy, RedundancySums
from .speculation import CheckSpeculation, CompareSpeculation, Exactness, SpeculationComparison

__all__ = [
    "DEFAULT_BATCH_SIZE",
    "DEFAULT_WORKLOAD",
    "NO_COMPENSATION",
    "TOKEN_GROUPS",
    "Alone",
    "AnswerDense",
    "Artifact",
    "CheckSpeculation",
    "CompareEngineLatency",
    "CompareLatency",
    "CompareSpeculation",
    "CompareText",
    "DenseAnswers",
    "EngineComparison",
    "EngineFound",
    "EngineLevel",
    "EngineTimes",
    "EvaluateOtherTask",
    "EvaluatePlans",
    "Evaluation",
    "EvaluationFailure",
    "Evaluations",
    "Exactness",
    "Failure",
    "FindEngine",
    "FitCompensation",
    "FitGuards",
    "FittedCompensation",
    "FittedGuard",
    "FittedGuards",
    "GapShare",
    "KindSums",
    "LatencyComparison",
    "LatencyProfile",
    "LinearRedundancy",
    "MeasureLinearRedundancy",
    "MeasureRedundancy",
    "ModelSource",
    "ProfileLatency",
    "RedundancySums",
    "Reply",
    "Request",
    "SentAway",
    "ShowSamples",
    "ShownSample",
    "ShownSamples",
    "SpeculationComparison",
    "TextDivergence",
    "Timing",
    "WorkerInfo",
    "Workload",
]

Timing = ProfileLatency | CompareLatency | CompareSpeculation | CompareEngineLatency
"""Requests that measure time: no other worker may use the device meanwhile."""

Alone = Timing | FitGuards
"""Requests that a pool runs with no other beside them on the device; fitting guards ends with timing them."""

Request = (
    Timing
    | FindEngine
    | CheckSpeculation
    | EvaluatePlans
    | AnswerDense
    | EvaluateOtherTask
    | ShowSamples
    | CompareText
    | MeasureRedundancy
    | FitCompensation
    | MeasureLinearRedundancy
    | FitGuards
)
Reply = (
    Evaluations
    | DenseAnswers
    | Evaluation
    | ShownSamples
    | TextDivergence
    | LatencyProfile
    | LatencyComparison
    | SpeculationComparison
    | Exactness
    | EngineFound
    | EngineComparison
    | RedundancySums
    | FittedCompensation
    | LinearRedundancy
    | FittedGuards
)


@dataclass(frozen=True)
class Failure:
    """A request that raised or whose worker died; the job goes on and records the reason."""

    request: Request
    reason: str
    attempts: int
