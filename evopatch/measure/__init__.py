"""What a patched model costs and gains: FLOPs, memory, time, accuracy, pictures."""
