"""The rows of the table: what is tuned, in which blocks, and which mitigation is added."""

from typing import NamedTuple

from common.trainers import DP_SGD


class Tuned(NamedTuple):
    """What is tuned.

    Args:
        title: Title on the page.
        method: Name of the method, as in `--method` of train_memcontrol.py.
        color: Colour in the plots.
        blocks: Granularity of the mask. One block of all layers makes whole weights a full fine-tune.
    """

    title: str
    method: str
    color: str
    blocks: str | list[str] = "block"


TUNED = {
    "full": Tuned("full fine-tune", "weights", "tab:blue", [".*"]),
    "svdiff": Tuned("SV-DIFF", "svdiff", "tab:orange"),
    "difffit": Tuned("DiffFit", "difffit", "tab:green"),
    "attention": Tuned("attention weights", "attention", "tab:red"),
    "lora": Tuned("LoRA", "lora", "tab:purple"),
    "norm": Tuned("norms", "norm", "tab:brown"),
    "bias": Tuned("biases", "bias", "tab:olive"),
}
PEFT = tuple(name for name in TUNED if name != "full")
SEARCHED = ("svdiff", "difffit", "attention", "lora")
MITIGATED = ("full", "svdiff", "difffit", "attention")
ADDED = ("rwa", "threshold")


class Row(NamedTuple):
    """A row of the table.

    Args:
        title: Title on the page.
        tuned: What is tuned, a name out of `TUNED`.
        mask: Where the mask comes from. `on`: all blocks. `off`: no block, the frozen base. `found`: a search.
            `random`: a random mask of the size of the found one. In the transfer table: `own`, `transferred` and
            `random transferred`.
        mitigation: Mitigations that are added.
    """

    title: str
    tuned: str
    mask: str = "on"
    mitigation: tuple[str, ...] = ()


ROWS: dict[str, Row] = {
    "base": Row("frozen base", "svdiff", "off"),
    **{name: Row(tuned.title, name) for name, tuned in TUNED.items()},
    **{
        f"{name}+{added}": Row(f"{TUNED[name].title} with {added}", name, "on", (added,))
        for name in MITIGATED
        for added in ADDED
    },
    **{f"memcontrol-{name}": Row(f"MemControl, {TUNED[name].title}", name, "found") for name in SEARCHED},
    **{
        f"memcontrol-svdiff+{added}": Row(f"MemControl, SV-DIFF, with {added}", "svdiff", "found", (added,))
        for added in ADDED
    },
    "random-svdiff": Row("SV-DIFF, a random mask of MemControl's size", "svdiff", "random"),
    "svdiff+dp_sgd": Row("SV-DIFF with DP-SGD (ε 8)", "svdiff", "on", (DP_SGD,)),
    "transfer-own": Row("mask found on this set", "svdiff", "own"),
    "transfer-mask": Row("mask found on the other set", "svdiff", "transferred"),
    "transfer-random": Row("random mask of the other's size", "svdiff", "random transferred"),
}
MAIN = [row for row in ROWS if not row.startswith("transfer-")]
TRANSFER = ["svdiff", "transfer-mask", "transfer-own", "transfer-random"]
GROUPS = {"main": MAIN, "transfer": TRANSFER}
