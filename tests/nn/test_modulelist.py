"""Until tests/distributed/test_modulelist.py imports it from there."""

from tests.nn.stacks.looping_model import Model as Model
