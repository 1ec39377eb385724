"""What is in a checkpoint, whoever wrote it: tensors, their pieces, and where the bytes of each piece are."""
