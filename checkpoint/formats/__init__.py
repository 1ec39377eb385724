"""Formats of checkpoints, ours and those of others: each is a source, a sink, or both, over the one catalog."""
