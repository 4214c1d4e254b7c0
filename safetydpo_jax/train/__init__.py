"""Preference training: the losses, the compiled step, the state on disk, and the run."""
