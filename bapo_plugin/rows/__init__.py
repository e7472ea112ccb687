"""Preference rows: what a row says, as text and as tokens. Knows no model."""
