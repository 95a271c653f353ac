"""Programs as files, for launchers that start files. A wheel has them as `megalite.launcher`."""
