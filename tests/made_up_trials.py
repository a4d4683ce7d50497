"""A table of real trials that is made up, for tests."""

import itertools

import numpy as np
import pandas as pd

from trials.rewards import OUTCOMES


def made_up_trials() -> pd.DataFrame:
    """Three groups, two rates: the more is tuned and the faster, the better the fid and the worse the AUC."""
    rng, rows = np.random.default_rng(0), []
    for mask in itertools.product((False, True), repeat=3):
        for rate in (1e-4, 1e-3) if any(mask) else (1e-4,):
            learnt = np.dot(mask, (3, 2, 1)) * (1 + (rate > 5e-4))
            row = {f"mask.{name}": on for name, on in zip("abc", mask)}
            row |= {"learning_rate": rate, "steps": 5, "seed": 0, "trainable_parameters": sum(mask)}
            row |= {"fid": 8 - learnt + rng.normal(0, 0.1), "membership_auc": 0.5 + learnt / 30, "loss": 0.2}
            row |= {"loss_train": 0.2 - learnt / 100, "audit_amd": rng.random()}
            for stage, share in enumerate((0.25, 0.5)):
                row |= {f"stage{stage}_fid": 8 - share * learnt, f"stage{stage}_loss": 0.3 - share * learnt / 100}
                row[f"stage{stage}_membership_auc"] = 0.5
            row |= {"seconds_train_with_stages": 40.0, "seconds_fid": 8.0}
            row |= {"audit_trajectory_norm_auc": rng.random()}
            row |= {f"noise_norm_{t}_train": 10 - learnt for t in (100, 300, 500, 700, 900)}
            row |= {f"noise_norm_{t}_auc": rng.random() for t in (100, 300, 500, 700, 900)}
            row |= {name: learnt for name in OUTCOMES if name.startswith("audit")}
            row |= {"audit_copy_share": 0.0, "canaries_copy": 0, "canaries_extraction": learnt > 6}
            rows.append(row | {"seconds_membership_auc": 2.0, "seconds_noise_norm": 3.0})
    return pd.DataFrame(rows)
