"""The epoch loop: recipes, the sieve, run folders, reports."""
