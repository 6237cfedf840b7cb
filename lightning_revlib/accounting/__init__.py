"""Where the memory of a training step goes: by owner, on the machine or before it is rented."""
