"""Proof that a run file trains the same model on every layout, each in processes of its own."""
