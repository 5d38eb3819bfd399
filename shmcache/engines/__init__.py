"""The engines, one file each; imported by the registry when their scheme is opened."""
