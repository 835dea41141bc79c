"""Idempotent scripts that turn pinned public sources into the packs under `datamodules/packs`."""
