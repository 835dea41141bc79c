"""Private API of torch, lightning and jsonargparse, one file for each subject. No other source file imports any.

Each file states what a new release has to keep, and why no public API serves. ``tests/modules/core/test_compat.py``
tests that.
"""
