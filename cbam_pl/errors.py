"""The one exception for what the user can mend; the command line turns it into one line and exit status 2."""


class UserError(Exception):
    """A mistake that the user can mend. Its message is one line that names the thing and the mend."""
