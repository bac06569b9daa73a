"""Recipes: coroutines `recipe(seed, call) -> [[kind, row], …]`, with kinds and rows as in soul/rows.py.

A recipe asks with `await call(stage, messages, replicate=0, …)`, gets a Reply whatever happened, and returns what its row
came to: "sft", "preference" and "rejected" rows. It keeps no state between rows, so any row can be computed again.
"""
