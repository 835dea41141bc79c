"""Which rows of a pool are trained on."""
