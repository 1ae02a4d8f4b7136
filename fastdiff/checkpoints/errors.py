"""What goes wrong with a file or a state dict."""


class CheckpointError(ValueError):
    """A checkpoint is damaged, foreign, or does not fit its own description; the message says which and what to do."""
