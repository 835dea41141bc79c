"""Modality balancing: one file a method, named after its paper."""
