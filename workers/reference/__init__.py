"""The reference model: how the small LLaVA checkpoint in `configs/reference/` is built and trained."""
