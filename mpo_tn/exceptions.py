"""The one error that users of this package have to catch."""


class MPOError(ValueError):
    """A wrong argument, matrix, model or file.

    The message names the offending value and says what to do instead. Nothing has been changed when it is raised.

    >>> from mpo_tn import Sites
    >>> Sites(out=(2, 3), in_=(4,))
    Traceback (most recent call last):
        ...
    mpo_tn.exceptions.MPOError: out=(2, 3) has 2 legs and in_=(4,) has 1: give one leg per site on each side, using 1 where a site has none
    """
