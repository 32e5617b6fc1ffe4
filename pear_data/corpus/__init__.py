"""Corpora as people have them: files, rows, the layouts of their fields, sample ids, and the tokens of a store."""
