"""New plans from known ones: single changes, exchanges that keep the number of touched layers, crossings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from optimizer.search.space import COMPENSATED, RUN, SKIP

Allowed = Callable[[str], bool]


class Moves:
    """Draws texts over the letters of a space; ``allowed`` says which texts are plans of it."""

    def __init__(self, letters: Sequence[str], allowed: Allowed, random: np.random.Generator) -> None:
        self._letters, self._allowed, self._random = letters, allowed, random
        self._free = [layer for layer, own in enumerate(letters) if len(own) > 1]
        self.skip_letters = tuple(letter for letter in (SKIP, COMPENSATED) if any(letter in own for own in letters))

    def neighbours(self, text: str) -> Iterator[str]:
        """Every allowed text that differs in one layer, in order."""
        for layer in self._free:
            for letter in self._letters[layer]:
                if letter != text[layer]:
                    changed = self._unmixed(text[:layer] + letter + text[layer + 1 :], letter)
                    if self._allowed(changed):
                        yield changed

    def exchange(self, text: str) -> str | None:
        """One touched layer runs again and another one takes its action, if that gives an allowed text."""
        touched = [layer for layer in self._free if text[layer] != RUN]
        if not touched:
            return None
        source = touched[int(self._random.integers(len(touched)))]
        takers = [layer for layer in self._free if text[layer] == RUN and text[source] in self._letters[layer]]
        if not takers:
            return None
        # Half of the exchanges stay close by: neighbouring layers resemble each other.
        near = [layer for layer in takers if abs(layer - source) <= 2]
        pool = near if near and self._random.random() < 0.5 else takers
        target = pool[int(self._random.integers(len(pool)))]
        letters = list(text)
        letters[source], letters[target] = RUN, text[source]
        changed = "".join(letters)
        return changed if self._allowed(changed) else None

    def change(self, text: str, layers: int) -> str | None:
        """So many random layers get another letter."""
        letters = list(text)
        for layer in self._random.permutation(self._free)[:layers]:
            others = [letter for letter in self._letters[layer] if letter != letters[layer]]
            letters[layer] = others[int(self._random.integers(len(others)))]
        changed = self._unmixed("".join(letters), letters[0])
        return changed if self._allowed(changed) else None

    def cross(self, first: str, second: str) -> str | None:
        """Every layer from one of two parents; or everything up to a random layer from the first."""
        if self._random.random() < 0.5:
            cut = int(self._random.integers(1, len(first)))
            child = first[:cut] + second[cut:]
        else:
            takes = self._random.random(len(first)) < 0.5
            child = "".join(a if take else b for a, b, take in zip(first, second, takes, strict=True))
        child = self._unmixed(child, COMPENSATED if COMPENSATED in first else SKIP)
        return child if self._allowed(child) else None

    def other_skip(self, text: str) -> str | None:
        """Compensate the skips of the same layers, or no longer compensate them."""
        if len(self.skip_letters) < 2:
            return None
        changed = text.replace(SKIP, COMPENSATED) if SKIP in text else text.replace(COMPENSATED, SKIP)
        return changed if changed != text and self._allowed(changed) else None

    def _unmixed(self, text: str, preferred: str) -> str:
        """Skips are compensated all or none; ``preferred`` (``S`` or ``C``) wins where both stand."""
        if SKIP in text and COMPENSATED in text:
            return text.replace(SKIP, COMPENSATED) if preferred == COMPENSATED else text.replace(COMPENSATED, SKIP)
        return text
