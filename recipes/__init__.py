"""Recipes: run one from the repository's root, as ``python -m recipes.arithmetic``."""
