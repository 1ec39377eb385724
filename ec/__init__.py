"""Erasure codes: what any m of k + m nodes held, from the others. Knows bytes only, nothing of images or nodes."""
