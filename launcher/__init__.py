"""What a user starts; where MegaLite is installed these are `megalite.launcher`."""
