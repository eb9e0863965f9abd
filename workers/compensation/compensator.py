"""Fit the maps of plans on one task's calibration split: calibrate once, and keep what was fitted."""

from __future__ import annotations

import platform
from typing import Any

import torch
import transformers

from workers.layerwise.decoder import Decoder, NotExactError
from workers.lru import LruCache
from workers.messages import (
    Artifact,
    FitCompensation,
    FittedCompensation,
    LinearRedundancy,
    MeasureLinearRedundancy,
)
from workers.models.loading import LoadedModel
from workers.runtime.folding import Maps
from workers.runtime.plan import SkipPlan
from workers.tasks import Task

from . import store
from .artifact import Provenance, decode, encode
from .calibration import NO_TEXT, Calibration, GeneralText, calibrate
from .fit import Fitted, fit
from .general_text import windows
from .linear_redundancy import linear_redundancy, tokens_for
from .recipe import CompensationError, Recipe
from .shared import SharedFits

KEPT_PLANS = 64
"""Fitted plans, and read artifacts, that are kept."""


class Compensator:
    """Fit the maps of plans of one model on one task's calibration split.

    Equal plans give equal maps: where the family's layers can be called one at a time, plans share what they begin
    with; otherwise each plan is fitted by itself, with a pass for every gap.
    """

    def __init__(self, loaded: LoadedModel, task: Task) -> None:
        self.loaded, self.task = loaded, task
        self.text: str | None = None
        """General text that recipes of mixtures may name."""
        self._calibration: tuple[tuple[Any, ...], Calibration] | None = None
        self._shared: SharedFits | None = None
        self._fitted: LruCache[tuple[str, str], Fitted] = LruCache(KEPT_PLANS)
        self._read: LruCache[str, Maps] = LruCache(KEPT_PLANS)

    def maps(self, plan: SkipPlan, compensation: str, artifact: Artifact | None = None) -> Maps | None:
        """Return a plan's maps: None where skips stay plain, those of ``artifact`` where given, else fitted ones.

        Raises :class:`CompensationError` when they cannot be fitted or read.
        """
        recipe = Recipe.parse(compensation)
        if recipe.is_none:
            return None
        if artifact is None:
            return self.fitted(plan, recipe).maps
        known = self._read.get(artifact.checksum)
        if known is not None:
            return known
        return self._read.put(artifact.checksum, decode(store.get(artifact), plan=plan.text).maps)

    def fitted(self, plan: SkipPlan, recipe: Recipe) -> Fitted:
        """Return the fit of a plan, from memory where it is known."""
        key = (plan.text, recipe.text)
        return self._fitted.get(key) or self._fitted.put(key, self._fit(plan, recipe))

    @property
    def failed_samples(self) -> dict[str, str]:
        """Calibration samples that the last maps were fitted without, and why."""
        return {} if self._calibration is None else self._calibration[1].failed_samples

    def fit(self, request: FitCompensation) -> FittedCompensation:
        """Fit a plan's maps for keeping: the file's content, and how well they fit."""
        recipe = Recipe.parse(request.compensation)
        if recipe.is_none:
            raise CompensationError("compensation none has no maps to fit")
        self.text = request.text
        plan = SkipPlan.parse(request.plan)
        fitted = self.fitted(plan, recipe)
        calibration = self.calibration(recipe)
        provenance = Provenance(
            model_fingerprint=self.loaded.fingerprint,
            task=self.task.name,
            samples=len(calibration.samples),
            tokens=calibration.kept,
            text_tokens=calibration.text_tokens,
            settings=self._settings(),
        )
        return FittedCompensation(
            plan=fitted.plan,
            compensation=fitted.compensation,
            content=encode(fitted, provenance),
            gaps=fitted.gaps,
            tokens=calibration.kept,
            text_tokens=calibration.text_tokens,
            samples=len(calibration.samples),
            seconds=fitted.seconds,
            failed_samples=calibration.failed_samples,
        )

    def linear_redundancy(self, request: MeasureLinearRedundancy) -> LinearRedundancy:
        """Return the linear redundancy of the dense model's layers."""
        width = int(self.loaded.model.config.get_text_config(decoder=True).hidden_size)
        calibration = calibrate(self.loaded, self.task, tokens=tokens_for(width))
        shares = linear_redundancy(self.loaded, calibration, ridge=request.ridge)
        return LinearRedundancy(
            shares, calibration.kept, calibration.holders["mlp"].refusals, calibration.failed_samples
        )

    def calibration(self, recipe: Recipe) -> Calibration:
        """Return the calibration of a recipe; the last one is kept, since it holds the dense states of all layers."""
        key = (recipe.tokens, recipe.seed, recipe.text_share, recipe.text_id)
        if self._calibration is None or self._calibration[0] != key:
            self._calibration = self._shared = None  # before the next one is made: both would not fit beside each other
            text = (
                GeneralText(windows(self.loaded, recipe, self.text), recipe.text_share)
                if recipe.text_share
                else NO_TEXT
            )
            tokens = max(1, recipe.tokens - round(recipe.text_share * recipe.tokens))
            calibration = calibrate(self.loaded, self.task, tokens=tokens, seed=recipe.seed, text=text)
            self._calibration = key, calibration
        return self._calibration[1]

    def shared(self, recipe: Recipe) -> SharedFits:
        """Fits whose maps are shared by plans that begin alike.

        Raises NotExactError when the family's layers cannot be called one at a time.
        """
        calibration = self.calibration(recipe)
        if self._shared is None or self._shared.recipe != recipe:
            self._shared = SharedFits(Decoder(self.loaded.model), calibration, recipe)
        return self._shared

    def _fit(self, plan: SkipPlan, recipe: Recipe) -> Fitted:
        try:
            shared = self.shared(recipe)
        except NotExactError:
            return fit(self.loaded.model, self.calibration(recipe), plan, recipe)
        return shared.fit(plan)

    def _settings(self) -> str:
        config = self.loaded.model.config.get_text_config(decoder=True)
        return (
            f"dtype={str(self.loaded.model.dtype).removeprefix('torch.')} attention={config._attn_implementation} "
            f"device={self.loaded.device.type} threads={torch.get_num_threads()} python={platform.python_version()} "
            f"torch={torch.__version__} transformers={transformers.__version__}"
        )
