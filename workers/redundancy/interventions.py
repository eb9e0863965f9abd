"""Measure what changing a layer does to the answer: causal contribution, propagation gain, vision withdrawal."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from workers.layerwise.hooks import hidden_of
from workers.messages import KindSums
from workers.models.loading import LoadedModel
from workers.runtime.descriptor import FamilyDescriptor, validate
from workers.runtime.locate import DecoderStack
from workers.runtime.plan import Action, PlanError, SkipPlan

from .batches import Batch
from .collectors import array, cosine_distance
from .kinds import ANSWER, GROUPS, ON_FEW, TRIED
from .replay import DensePass, replay
from .sums import ratio_sums, sample_sums


class Interventions:
    """Replay changed plans against one batch's dense pass and add up what they do to the answer.

    Without ``tries`` nothing is added to the sums of trials.
    """

    def __init__(
        self, loaded: LoadedModel, stack: DecoderStack, descriptor: FamilyDescriptor, kinds: set[str], *, tries: bool
    ) -> None:
        self._loaded, self._stack, self._descriptor, self._kinds = loaded, stack, descriptor, kinds
        self._tries = tries
        self._layers = len(stack.layers)
        self._gain = ratio_sums(3, len(GROUPS) + 1, self._layers)
        # Divergences of the answer's first token, and of all its tokens.
        self._removal = ratio_sums(2, self._layers)
        self._kl = {kind: ratio_sums(2, len(actions), self._layers) for kind, actions in TRIED.items()}
        self._withdrawal = ratio_sums(2, 1, self._layers)
        self.executions: dict[str, float] = dict.fromkeys(kinds, 0.0)
        """Decoder layers run, times samples as in ``RedundancySums``; a replay that serves several kinds is counted
        as the first one's."""
        self.shared_prefixes = True
        self.refused: dict[str, dict[str, str]] = {kind: {} for kind in kinds}

    def add(self, batch: Batch, dense: DensePass, changes: list[Tensor]) -> None:
        """Replay every intervention on a batch; ``changes`` holds each layer's output minus input, per layer."""
        for layer in range(self._layers):
            for action in Action:
                self._try(batch, dense, layer, action, changes[layer])
            if "withdrawal" in self._kinds:
                plan = SkipPlan((*[Action.RUN] * layer, *[Action.BYPASS] * (self._layers - layer)))
                replayed = self._replay(("withdrawal",), str(layer), batch, dense, plan, layer)
                if replayed is not None:
                    self._add_kl(self._withdrawal[:, :, 0, layer], self._divergences(batch, dense, replayed))

    def _try(self, batch: Batch, dense: DensePass, layer: int, action: Action, change: Tensor) -> None:
        """Replay an action at a layer, for all kinds that ask for it."""
        removed = ["propagation"] if action is Action.SKIP and "propagation" in self._kinds else []
        tried = [kind for kind in TRIED if kind in self._kinds and action in TRIED[kind]]
        kinds = [*removed, *(kind for kind in tried if self._tries or kind not in ON_FEW)]
        if not kinds:
            return
        plan = SkipPlan.dense(self._layers).with_action(layer, action)
        replayed = self._replay(kinds, f"{action.label} at {layer}", batch, dense, plan, layer)
        if replayed is None:
            return
        divergences = self._divergences(batch, dense, replayed)
        for kind in kinds:
            if kind == "propagation":
                self._add_kl(self._removal[:, :, layer], divergences)
                self._add_gain(batch, layer, change, hidden_of(dense.outputs[-1]), replayed[1])
            else:
                self._add_kl(self._kl[kind][:, :, TRIED[kind].index(action), layer], divergences)

    def _replay(
        self, kinds: Sequence[str], name: str, batch: Batch, dense: DensePass, plan: SkipPlan, first: int
    ) -> tuple[Tensor, Tensor] | None:
        """Replay a plan for some kinds; None, and the reason recorded under ``name``, where it is refused."""
        try:
            validate(plan, self._descriptor)
        except PlanError as error:
            for kind in kinds:
                self.refused[kind][name] = str(error)
            return None
        start = first if self.shared_prefixes else 0
        self.executions[kinds[0]] += batch.work * (plan.executions - start)
        return replay(self._loaded, self._stack, dense, batch, plan, start)

    def _add_gain(self, batch: Batch, layer: int, change: Tensor, dense: Tensor, final: Tensor) -> None:
        masks = torch.stack([batch.groups[group] for group in (*GROUPS, ANSWER)]).double()  # [groups, batch, tokens]
        there = masks.sum(-1)

        def size(states: Tensor) -> Tensor:
            squares = states.float().square().sum(-1).double()
            return torch.einsum("gbt,bt->gb", masks, squares).sqrt()

        moved, first, whole = size(final.float() - dense.float()), size(change), size(dense)
        gain = torch.where(first > 0, moved / first.clamp_min(1e-30), 0.0)
        self._gain[:, 0, :, layer] += sample_sums(array(gain), array((there > 0) & (first > 0)))
        share = moved / whole.clamp_min(1e-30)
        self._gain[:, 1, :, layer] += sample_sums(array(share), array(there > 0))
        turned = torch.einsum("gbt,bt->gb", masks, cosine_distance(dense, final).double())
        self._gain[:, 2, :, layer] += sample_sums(array(turned), array(there))

    @staticmethod
    def _divergences(batch: Batch, dense: DensePass, replayed: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        assert dense.logits is not None
        return answer_divergences(dense.logits, replayed[0], batch.answering)

    @staticmethod
    def _add_kl(sums: np.ndarray, divergences: tuple[Tensor, Tensor]) -> None:
        """Add to ``sums`` ``[6, 2]``, of one layer and action."""
        for row, divergence in enumerate(divergences):
            sums[:, row] += sample_sums(array(divergence), np.ones(len(divergence)))

    def sums(self) -> dict[str, KindSums]:
        found = {
            "propagation": {"gain": self._gain, "kl": self._removal},
            "withdrawal": {"kl": self._withdrawal},
        }
        found |= {kind: {"kl": self._kl[kind]} for kind in TRIED}
        return {kind: KindSums(dict(found[kind]), refused=self.refused[kind]) for kind in self._kinds}


def answer_divergences(dense: Tensor, changed: Tensor, answering: Tensor) -> tuple[Tensor, Tensor]:
    """Divergence of the answer's first token, and the mean over its tokens, per sample ``[batch]``.

    Logits are ``[batch, tokens, vocabulary]``, and ``answering``, bool ``[batch, tokens]``, says which count.
    """
    # A token at a time, since logits of many tokens in double precision are large.
    each = torch.stack([answer_kl(*pair) for pair in zip(dense.unbind(1), changed.unbind(1), strict=True)], dim=1)
    counted = answering.to(each.device)
    return each[:, 0], (each * counted).sum(1) / counted.sum(1)


def answer_kl(dense: Tensor, changed: Tensor) -> Tensor:
    """KL(p_dense || p_changed) in nats per sample, ``[batch]``, from logits ``[batch, vocabulary]``."""
    first, second = dense.double().log_softmax(-1), changed.double().log_softmax(-1)
    terms = torch.where(first.isneginf(), 0.0, first.exp() * (first - second))
    return terms.sum(-1).clamp_min(0.0)
