"""Modality balancing: one file per method, named after its paper."""
