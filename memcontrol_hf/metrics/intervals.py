"""Confidence intervals that several measures share."""

from scipy.stats import beta


def clopper_pearson(found: float, of: int) -> tuple[float, float]:
    """The exact 95 % interval of a rate (Clopper & Pearson, Biometrika 1934, 26:404), by its beta quantiles.

    Args:
        found (`float`): in [0, of]; may be a fraction where several images count as one draw.
        of (`int`): how many draws, above 0.
    """
    low = 0.0 if found <= 0 else float(beta.ppf(0.025, found, of - found + 1))
    high = 1.0 if found >= of else float(beta.ppf(0.975, found + 1, of - found))
    return low, high
