"""List the installed versions of what answers depend on."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

ANSWERING = ("torch", "torchvision", "transformers", "tokenizers", "pillow")
"""They compute, resize images, render prompts and cut them into tokens; another version may answer otherwise."""


def installed_versions() -> dict[str, str]:
    """Return the versions of those that are installed, by name, without importing them."""
    found = {}
    for name in ANSWERING:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
