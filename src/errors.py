"""Errors that are the user's to mend, as opposed to our own bugs."""


class UserError(Exception):
    """A mistake in what was asked for: one line that names the option and the cure.

    The command-line doors print it without a traceback and exit with status 2. Mathematical rooms raise a
    plain `ValueError` in their constructors; `src.app.build.build` adds the option's name to it.
    """
