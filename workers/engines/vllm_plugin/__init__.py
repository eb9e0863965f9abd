"""Serve skip plans in vLLM: a plug-in to install beside it, which imports nothing else of this project.

The folder is a package of its own, ``skipplan_vllm`` (``pyproject.toml``), for environments that hold vLLM.
"""
