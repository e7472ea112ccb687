"""The trainer and what it does beside training."""
