"""``descant plan``: what a run needs on many accelerators, by a step of the real recipe on tensors without data."""
