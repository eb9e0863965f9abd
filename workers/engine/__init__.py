"""Evaluating many plans with few layer executions: packed prompts, walked layer by layer as a trie of plans."""
