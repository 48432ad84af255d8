"""Files of patched models for other runtimes, run there and compared with the model before they are left in place."""
