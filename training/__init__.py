"""Datasets to weights: packing, losses, one fit loop, SFT, DPO, preflight."""
