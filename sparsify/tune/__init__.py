"""Measuring, once for a machine, which kernel is the fastest for each layer and where dense is faster."""
