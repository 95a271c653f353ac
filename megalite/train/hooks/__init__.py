"""Hooks of the training loop, one concern a file: actions around steps and saves."""

from megalite.train.hooks.hook import CONTINUE, Hook, Outcome, SaveReport, StepReport

__all__ = ["CONTINUE", "Hook", "Outcome", "SaveReport", "StepReport"]
