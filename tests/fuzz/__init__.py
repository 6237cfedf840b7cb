"""Random programs: stacks drawn from a seed, compared with ordinary autograd. `python -m tests.fuzz --help`."""
