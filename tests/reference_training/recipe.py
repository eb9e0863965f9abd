"""The recipe of the shipped reference model: what its training does, phase by phase."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class VisionTraining:
    """Stage 1: how long and how fast the tower is trained. Each epoch draws scenes never seen before."""

    epochs: int = 12
    scenes_per_epoch: int = 6000
    batch: int = 64
    rate: float = 1.5e-3
    seed: int = 0


@dataclass(frozen=True)
class Training:
    """One phase of stage 2: how many steps, what a step sees, and how fast it learns.

    easy_images, questions: easy-VQA images in a step and how many of its own questions each is asked. balanced: whether
    each is asked balanced yes/no questions besides. scenes: scenes in a step, never seen before; with 0 the second half
    of the step sees other easy-VQA images. tower_rate: the vision tower's share of the rate. decay: share of the steps
    at the end in which the rate falls to zero. other_wordings: share of the captions asked for in other words.
    question_weight: weight of the questions' own tokens in the loss, beside the answers'.
    """

    name: str
    steps: int
    rate: float = 1e-3
    warmup: int = 150
    decay: float = 0.0
    easy_images: int = 16
    questions: int = 3
    balanced: bool = True
    scenes: int = 32
    question_weight: float = 0.0
    tower_rate: float = 0.3
    other_wordings: float = 0.2
    save_every: int = 100
    seed: int = 0


RECIPE = (
    # Both tasks as they are: captions and open questions are learnt, yes/no questions are answered by habit.
    Training("both-tasks", steps=200, easy_images=24, questions=8, balanced=False, scenes=48),
    # Both answers in balance, and the question's words are predicted too, which makes them look at the image.
    Training("balanced", steps=100, question_weight=0.5),
    # easy-VQA alone: without the captions' gradients the comparison of question and image is found in 60 steps.
    Training("yes-no", steps=100, rate=2e-3, scenes=0, question_weight=0.2),
    # Both tasks, to the end. Captions come back within 20 steps.
    Training("finish", steps=540, rate=1.2e-3, warmup=60, decay=0.4, easy_images=14, scenes=40),
)
"""The phases of stage 2. Each goes on from the averaged weights of the one before, with the next seed."""
