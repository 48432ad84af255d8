"""One forward pass of a patched model: its state, and what runs in place of the blocks."""
