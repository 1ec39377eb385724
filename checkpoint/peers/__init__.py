"""Agents of other nodes: reads and pushes of bytes, small questions, authenticated. Knows no images and no parity."""
