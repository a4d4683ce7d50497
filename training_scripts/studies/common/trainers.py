"""Trainers of the studies: the demo's base and one method in some blocks."""

from collections.abc import Mapping

from datasets import Dataset
from peft import PeftConfig
from transformers import PrinterCallback

from memcontrol_hf import MemControlTrainer, MemControlTrainingArguments, SearchSpace, demo_pipeline
from memcontrol_hf.from_flags import METHODS

DP_SGD = "dp_sgd:epsilon=8,delta=0.001,max_grad_norm=0.05"  # the defaults of the mitigation do not fit 128 rows


def demo_trainer(
    data: Mapping[str, Dataset],
    method: str | PeftConfig,
    args: MemControlTrainingArguments,
    blocks: str | list[str] = "block",
    mask: dict[str, bool] | None = None,
) -> MemControlTrainer:
    """A trainer of the demo's base that prints nothing, because a study prints one line for each piece of work.

    Args:
        data: Splits `train` and `validation` with the columns `image` and `text`.
        method: Name of the method, as in `--method` of train_memcontrol.py, or a PEFT config.
        args: Arguments of the training; the progress bar is switched off in them.
        blocks: Granularity of the mask, as in [`~memcontrol_hf.SearchSpace.from_model`].
        mask: Blocks that are tuned; all blocks when not given.
    """
    pipeline = demo_pipeline()
    args.disable_tqdm = True
    trainer = MemControlTrainer(
        pipeline=pipeline,
        peft_config=METHODS[method][0] if isinstance(method, str) else method,
        args=args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        search_space=SearchSpace.from_model(pipeline.unet, blocks),
        mask=mask,
        encoder="demo",
    )
    trainer.remove_callback(PrinterCallback)
    return trainer
