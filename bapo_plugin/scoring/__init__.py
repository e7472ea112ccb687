"""Rows of tokens to log-probs of policy and reference."""
