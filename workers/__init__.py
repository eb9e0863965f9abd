"""Models, tasks and measurements: skip runtime, evaluation, redundancy, compensation, latency, and the Ray workers."""

import sys

from .models.without_torchvision import BeforeTransformers

sys.meta_path.insert(0, BeforeTransformers())
