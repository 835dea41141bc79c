"""What ``descant new`` copies: working modules, each with its YAML and its test.

They are real files, so the linters and the tests hold them to the house rules; a copy differs by its names alone.
"""
