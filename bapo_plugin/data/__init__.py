"""Preference rows with a base response: from the YAML's data sets to token ids.

load.py   the data sets of a configuration, checked, cached, split
formats.py   any DPO prompt strategy of axolotl, with the base response rendered like the chosen one
rows.py   one row: checks, tokens, length policy
collator.py   rows to tensors
"""
