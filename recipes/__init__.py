"""Recipes: training modules, data and runs behind `revlib train`; shipped as `lightning_revlib.recipes`."""
