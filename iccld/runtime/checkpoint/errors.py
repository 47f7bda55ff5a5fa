"""Errors of checkpoints: which of them cannot be used, and why."""


class CheckpointError(ValueError):
    """Error: a checkpoint cannot be used; the message says why."""


class DamagedError(CheckpointError):
    """Error: something in a checkpoint is missing, cut or changed."""


class ForeignFormatError(CheckpointError):
    """Error: another version wrote the checkpoint, in a format that this one does not read."""
