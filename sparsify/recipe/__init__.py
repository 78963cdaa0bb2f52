"""The strict schema of a recipe, its file, and what can be wrong with either."""
