"""Settings found from a few images: what each run of blocks keeps, for one model and one target."""
