"""What a model can still do: zero-shot tasks, perplexity with its protocol, samples; each beside a baseline.

Pure: `groups`, `scores`, `report`. On a model in memory: `harness` (lm-evaluation-harness), `perplexity`, `samples`.
"""
