"""Evaluating many plans with few layer layer_executions: packed prompts, walked layer by layer as a trie of plans."""
