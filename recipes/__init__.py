"""Training modules, data and commands of `revlib train`; installed as `lightning_revlib.recipes`."""
