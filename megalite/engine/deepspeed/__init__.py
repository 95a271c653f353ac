"""The engine over DeepSpeed 0.19.8: the only package that imports it."""
