"""The confidence interval of a rate, which several measures share."""

from scipy.stats import beta


def clopper_pearson(found: float, total: float) -> tuple[float, float]:
    """The exact 95 % interval of a rate (Clopper & Pearson, Biometrika 1934, 26:404), by its beta quantiles.

    Args:
        found (`float`): number of draws that were found, in [0, total]; a fraction where several images count as one
            draw.
        total (`float`): number of draws, above 0.

    Returns:
        pair of `float`: lower and upper bound, each in [0, 1].
    """
    low = 0.0 if found <= 0 else float(beta.ppf(0.025, found, total - found + 1))
    high = 1.0 if found >= total else float(beta.ppf(0.975, found + 1, total - found))
    return low, high
