"""Pruning with calibration data: statistics of inputs, a walk block by block, local reconstruction."""
