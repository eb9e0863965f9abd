"""Apply fitted maps inside the trie of plans, between a kept layer and what runs next.

A map depends on what was executed before it, as does a node of the trie, so plans that begin alike share it. The
calibration tokens take the same path, in batches of their own, and their states are kept between requests.
"""

from __future__ import annotations

from itertools import product

from torch import Tensor

from workers.layerwise.decoder import Decoder, LayerOutput, NotExactError, Watch
from workers.layerwise.trie import ApplyMap, Execute
from workers.runtime.folding import FoldingError, fold_site, require_projection
from workers.runtime.gaps import PARTS, Part, holder
from workers.runtime.plan import Action

from .fit import changed_state
from .shared import SharedFits


class TrieMaps:
    """Map the state behind a run of skipped layers by the maps of one recipe.

    With k the kept layer before the run, its output is H = Y + M, where M is what its MLP added (its attention, where
    it runs without its MLP) and Y the rest of the residual stream. The map gives the state that the next executed layer
    (or the final norm) is given, from what is watched in layer k. The walk over the trie takes care of the rest:

    - ``ApplyMap`` steps stand in the path of every plan with a run of skips behind a kept layer, at the end of the run,
      so a mapped state is shared by all plans that begin with the same text, and by no other. They also stand behind
      layers that run without a part, and with ``drift`` behind every kept layer above.
    - The layer before the run also gives what ``watch`` names (``LayerOutput.watched``). In rows that do not go through
      the layer (frozen and bypassed vision tokens) it is 0.
    - Layers before the first kept one are skipped as they are: no layer stands before them.

    Raises:
        NotExactError: M is the sum of several modules' outputs.
    """

    def __init__(self, decoder: Decoder, fits: SharedFits) -> None:
        self._fits = fits
        self._watches: dict[tuple[int, Part], Watch] = {}
        for at in product(range(decoder.num_layers), PARTS):
            try:
                site = fold_site(decoder.stack, *at)
                if fits.recipe.scope == "projection":
                    self._watches[at] = Watch(require_projection(site, at[0]).module, inputs=True)
                    continue
            except FoldingError:
                continue  # no plan with a gap behind this layer gets here: it has no map
            if len(site.outputs) != 1:
                raise NotExactError("its layers add the outputs of several modules, of which the trie follows one")
            self._watches[at] = Watch(site.outputs[0])

    @property
    def compensation(self) -> str:
        return self._fits.recipe.text

    @property
    def drift(self) -> bool:
        """Whether kept layers above the first gap have maps too."""
        return self._fits.recipe.drift

    def watch(self, step: Execute) -> Watch:
        """Return the output of the part of a layer that holds its map, or what the part's last projection is given."""
        return self._watches[step.layer, holder(step.action)]

    def transform(self, step: ApplyMap, output: LayerOutput) -> Tensor:
        """Return the state ``[rows, tokens, hidden]`` with the map in place."""
        assert output.watched is not None
        change = self._fits.change(step.prefix)
        part = holder(Action.of(step.prefix[step.after]))
        acted_on = output.watched.flatten(0, 1) * self._fits.share(step.after, part)
        return changed_state(output.hidden, acted_on, change)
