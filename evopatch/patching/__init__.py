"""Patching models in place and back: adapters, what a patched model is, saving it."""
