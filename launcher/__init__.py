"""The programs that a user starts. An installed MegaLite has them as `megalite.launcher`."""
