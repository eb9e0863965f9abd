"""Say where skipplan keeps files between commands: built models, hashes, images of harnesses' tasks."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """Return the cache directory: SKIPPLAN_CACHE, else within the user's."""
    own = os.environ.get("SKIPPLAN_CACHE")
    if own:
        return Path(own).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "skipplan"
