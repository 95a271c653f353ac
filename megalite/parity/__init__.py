"""Proof that a run file trains the same model on every layout, and a dry run of one step."""
