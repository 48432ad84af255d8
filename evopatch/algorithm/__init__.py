"""The method as pure tensor functions: read these first. They know torch, and nothing of models."""
