"""The parity level: the images of a group of nodes, protected by Reed-Solomon parity in the memory of its agents."""
