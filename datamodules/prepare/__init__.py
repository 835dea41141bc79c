"""Preparation of data: fetch pinned packages, check their SHA-256, unpack and decode them (``python -m`` this)."""
