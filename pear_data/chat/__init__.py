"""Conversations to token ids and loss masks: templates rendered, scored spans found and checked, ids taken once."""
