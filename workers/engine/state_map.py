"""What repairs the state behind a run of skipped layers: the interface towards compensations.

With k the kept layer before the run, a layer's output is H = Y + M, where M is what its MLP added and Y the rest of the
residual stream. A compensation maps that state to one that the next executed layer (or the final norm) is given, for
example to Y + M T, by what it watches in the layer. The walk over the trie takes care of everything else:

- ``Repair`` steps stand in the path of every plan with a run of skips behind a kept layer, at the end of the run, so a
  repaired state is shared by all plans that begin with the same text, and by no other. With ``drift`` they also stand
  behind every kept layer above.
- The layer before the run is executed so that it also gives what ``watch`` names (``LayerOutput.watched``). In rows
  that do not go through the layer (frozen and bypassed vision tokens) it is 0.
- Layers before the first kept one are skipped as they are: nothing stands before them that could be repaired.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from workers.layerwise.decoder import LayerOutput, Watch
from workers.layerwise.trie import Repair


class Repairs(Protocol):
    """The repairs of one compensation."""

    @property
    def drift(self) -> bool:
        """Whether the state behind every kept layer above the first gap is repaired too."""
        ...

    def watch(self, layer: nn.Module) -> Watch:
        """What of a decoder layer the repair behind it looks at."""
        ...

    def transform(self, step: Repair, output: LayerOutput) -> Tensor:
        """The repaired state ``[rows, tokens, hidden]`` of any chunk; must treat every row (token) by itself."""
        ...
