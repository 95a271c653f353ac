"""Hooks of the training loop: what happens around steps and saves, one concern a file."""

from megalite.train.hooks.hook import CONTINUE, Hook, Outcome, SaveReport, StepReport

__all__ = ["CONTINUE", "Hook", "Outcome", "SaveReport", "StepReport"]
