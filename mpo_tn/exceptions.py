"""The one error that users of this package have to catch."""


class MPOError(ValueError):
    """A wrong argument, matrix, model or file.

    The message names the offending value and says what to do instead. Nothing has been changed when it is raised.

    >>> from mpo_tn import Sites
    >>> Sites(out=(2, 0), in_=(4, 1))
    Traceback (most recent call last):
        ...
    mpo_tn.exceptions.MPOError: leg 1 of out=0 must be a positive integer
    """
