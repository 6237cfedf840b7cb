"""The Hydra configuration of `revlib`, shipped as `lightning_revlib.conf`.

In a program of your own, `hydra: {searchpath: [pkg://lightning_revlib.conf]}` makes all groups available.
"""
