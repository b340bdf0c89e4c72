"""The errors a person can mend; the command line shows their message without a traceback."""


class ConfigurationError(ValueError):
    """A key has a value it cannot have; the message names both and what was expected."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to look at. Nothing is lost."""
