"""Which rows of a pool are trained on: selectors, and the threshold that separates true pairs from false ones."""
