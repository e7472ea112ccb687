"""How a model answers prompts: one way for base responses, retention and evaluation."""
