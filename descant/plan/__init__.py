"""``descant plan``: what a run needs on many accelerators, from a step of its real recipe on tensors without data."""
