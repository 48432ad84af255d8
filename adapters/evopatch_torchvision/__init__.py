"""Adapters for torchvision's models."""
