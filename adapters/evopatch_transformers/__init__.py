"""Adapters for the models of transformers."""
