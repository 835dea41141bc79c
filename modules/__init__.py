"""The parts: they know tensors, and nothing of files, recipes or trainers."""
