"""Weights to evidence: SOUL adherence, tool use, statistics, the report."""
