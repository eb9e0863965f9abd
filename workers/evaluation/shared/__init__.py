"""Evaluate many plans with few layer executions: prompts are packed, plans are walked layer by layer as a trie."""
