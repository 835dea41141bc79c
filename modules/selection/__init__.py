"""Selection of the rows of a pool to train on."""
