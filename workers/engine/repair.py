"""What repairs the state behind a run of skipped layers: the interface towards compensations.

With k the kept layer before the run, a layer's output is H = Y + M, where M is what its MLP added and Y the rest of the
residual stream. A compensation maps that state to one that the next executed layer (or the final norm) is given, for
example to Y + M T. The walk over the trie takes care of everything else:

- ``Repair`` steps stand in the path of every plan with a run of skips behind a kept layer, at the end of the run, so a
  repaired state is shared by all plans that begin with the same text, and by no other.
- The layer before the run is executed so that it also gives M (``LayerOutput.branch``), the output of the module that
  ``branch_of`` names. Rows that do not go through the layer (frozen and bypassed vision tokens) have M = 0.
- Calibration samples come first: on each new request their chunks walk the trie before any other, and ``fit`` is called
  at every ``Repair`` step with all of their states; what it learns is to be kept under ``step.prefix``, because the
  search samples' chunks, and later requests, call ``transform`` with that step.
- Layers before the first kept one are skipped as they are: nothing stands before them that could be repaired.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from workers.tasks import Sample

from .decoder import LayerOutput
from .packing import Chunk
from .trie import Repair


@dataclass(frozen=True)
class CalibrationState:
    """The state of one calibration chunk where a run of skipped layers ends.

    ``output.hidden`` and ``output.branch`` are ``[rows, tokens, hidden]`` behind layer ``step.after``, ``real`` (bool
    ``[rows, tokens]``) marks what is no padding, ``vision`` (bool, the same shape) vision tokens. ``run`` runs one of
    the skipped layers, fully, on hidden states of this chunk: ``run(layer, hidden) -> hidden``; chained over
    ``step.skipped`` it gives what the state would be had they not been skipped.
    """

    chunk: Chunk
    output: LayerOutput
    real: Tensor
    vision: Tensor
    run: Callable[[int, Tensor], Tensor]


class Compensator(Protocol):
    """Fits and applies the repairs of one compensation."""

    @property
    def calibration(self) -> Sequence[Sample]:
        """The samples that travel through the trie to be fitted on; their answers are not used."""
        ...

    def branch_of(self, layer: nn.Module) -> nn.Module:
        """The module of a decoder layer whose output is M."""
        ...

    def knows(self, step: Repair) -> bool:
        """Whether :meth:`transform` can already be called for the step."""
        ...

    def fit(self, step: Repair, states: Sequence[CalibrationState]) -> None:
        """Fit the repair of one run of skipped layers on the calibration chunks' states."""
        ...

    def transform(self, step: Repair, output: LayerOutput) -> Tensor:
        """The repaired state ``[rows, tokens, hidden]`` of any chunk; must treat every row (token) by itself."""
        ...
