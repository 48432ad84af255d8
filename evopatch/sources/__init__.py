"""Models, images and augmentation by name."""
