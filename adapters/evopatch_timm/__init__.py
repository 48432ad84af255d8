"""evopatch's adapters for timm."""
