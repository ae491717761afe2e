"""Widths of MLPs, which networks take as multiples of their channels."""


def mlp_ratio(hidden: int, width: int) -> float:
    """The ratio for which `int(width * ratio)`, as networks compute it, is `hidden`.

    The quotient may be rounded to just below it.
    """
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width
