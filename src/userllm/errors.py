"""The one error a person can cause and mend."""


class UserError(Exception):
    """Bad input: the message is one line that names the file and line or field, and what to do about it.

    The command line prints it as ``error: ...`` and exits with status 2, without a traceback.
    """
