"""Scoring engines: token ids in, log-probs of the scored tokens out. They know nothing of stores or text."""
