"""Errors that the user can fix, as opposed to bugs."""


class UserError(Exception):
    """An invalid option or input. The message is one line that names the option and the fix.

    The command-line entry points print it without a traceback and exit with status 2. Mathematical packages raise
    `ValueError` in their constructors; `src.app.build.build` adds the option's name to the message.
    """


class TooFewImages(UserError):
    """A set of images is too small for a score."""
