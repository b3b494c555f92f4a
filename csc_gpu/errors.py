"""What a user can do something about. The command line prints each as one line and exits with 2."""


class CscError(Exception):
    """Something is wrong with what was asked for: the message says what, where and what to do."""


class ConfigError(CscError):
    """A setting has an unknown name or a value out of range."""


class CorpusError(CscError):
    """Images, labels or features are missing, broken or do not fit together."""


class BackendUnavailable(CscError):
    """The machine that was asked for is not there; never replaced by another in silence."""


class OutputError(CscError):
    """A result cannot be written where it was asked for, or would overwrite another."""


class TrainingDiverged(CscError):
    """The model's features are not finite any more."""


class Interrupted(CscError):
    """The user stopped the work: the message says what was kept."""


class DeviceTooSmall(CscError):
    """The work does not fit into the device's memory, even in the smallest steps."""


class Terminated(Interrupted):
    """The machine wants its place back (SIGTERM): the work stopped at a checkpoint."""
