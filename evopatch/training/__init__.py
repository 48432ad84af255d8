"""Fine-tuning of patched models: settings, objectives, the loop, checkpoints, logs."""
