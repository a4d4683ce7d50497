"""What is measured of a model."""

METRICS = {
    "fid": "minimize",
    "amd": "maximize",
    "membership_auc": "minimize",
    "noise_norm": "minimize",
    "loss": "minimize",
}
"""What [`MemControlTrainer.evaluate`] can measure, and which way is better."""


def check_objectives(objectives: list[str]) -> None:
    """Raise `ValueError` for an objective that is no metric, one named twice, and none at all."""
    unknown = [name for name in objectives if name not in METRICS]
    if unknown or not objectives:
        raise ValueError(f"unknown objective(s) {', '.join(unknown) or '(none)'}: use some of {', '.join(METRICS)}")
    if len(set(objectives)) < len(objectives):
        raise ValueError(f"an objective is named twice: {', '.join(objectives)}")
