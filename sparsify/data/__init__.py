"""Data sets: what a recipe's `data` section names, as samples."""
