"""Files that ``descant new`` copies: working modules, each with its YAML and its test.

They are real files, so the linters and the tests check them; a copy differs only by its names.
"""
