"""What ends a run that was asked to stop: apart, so that the command line can know it without the training stack."""


class Stopped(Exception):
    """The run was asked to stop and has saved its state; the same command resumes it."""
