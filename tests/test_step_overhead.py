"""What is saved in a training step changes no result."""

import copy
import pickle
from collections import Counter

import pytest
import torch
from conftest import images_of, tiny_trainer
from datasets import Array2D, Array3D, Dataset, Features, List, Value, concatenate_datasets
from peft.tuners.tuners_utils import BaseTuner

from memcontrol_hf import trainer as trainer_module
from memcontrol_hf.data.columns import Columns
from memcontrol_hf.families import family_of
from memcontrol_hf.model_walks import restore_walks, shorten_walks, trained_parameters
from memcontrol_hf.tuners import MemControlConfig, MemControlModel


def trained(folder, **arguments):
    trainer = tiny_trainer(folder, max_steps=3, **arguments)
    trainer.train()
    return [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]


@pytest.mark.parametrize("arguments", [{}, {"gradient_accumulation_steps": 2}, {"mitigations": ["rwa:n=2"]}], ids=str)
def test_a_training_that_visits_no_module_in_its_steps_gives_the_same_adapter(tmp_path, monkeypatch, arguments):
    short = trained(tmp_path / "short", **arguments)
    monkeypatch.setattr(trainer_module, "shorten_walks", lambda model: None)
    assert all(map(torch.equal, short, trained(tmp_path / "long", **arguments)))


def test_modules_are_visited_once_in_a_training_and_as_ever_after_it(tmp_path, monkeypatch):
    trainer, visits = tiny_trainer(tmp_path, max_steps=4), Counter()
    train = torch.nn.Conv2d.train
    monkeypatch.setattr(
        torch.nn.Conv2d, "train", lambda self, mode=True: visits.update([id(self)]) or train(self, mode)
    )
    trainer.train()
    assert set(visits.values()) == {1}
    assert not {"train", "zero_grad"} & set(vars(trainer.model))
    trainer.model.eval().train()
    assert set(visits.values()) == {3}


def test_a_training_that_breaks_leaves_the_model_as_it_was(tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path, max_steps=2)
    monkeypatch.setattr(trainer, "compute_loss", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert "train" not in vars(trainer.model)


def test_short_walks_look_at_the_model_and_at_a_copy_at_its_own_parameters():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).requires_grad_(False)).eval()
    shorten_walks(model)
    other = copy.deepcopy(model)
    assert model[1].training and trained_parameters(other) == list(other[0].parameters())
    for each in (model, other):
        each(torch.ones(1, 2)).sum().backward()
    other.zero_grad()
    assert other[0].weight.grad is None and model[0].weight.grad is not None
    model.zero_grad(set_to_none=False)
    assert model[0].weight.grad.count_nonzero() == 0
    assert not model.eval()[1].training and model.train()[1].training
    restore_walks(model)
    model[1].requires_grad_(True)
    assert trained_parameters(model) == list(model.parameters())


def test_columns_are_read_as_datasets_reads_them():
    features = Features(
        {
            "image": Array3D((2, 1, 3), "float32"),
            "text": Array2D((2, 2), "float32"),
            "pooled": List(Value("float32"), length=3),
            "label": Value("int64"),
            "digest": Value("string"),
        }
    )

    def part(count, start):
        numbers = torch.arange(start, start + count, dtype=torch.float32)
        ones = numbers.view(-1, 1)
        columns = {"image": ones.repeat(1, 6).view(-1, 2, 1, 3), "text": ones.repeat(1, 4).view(-1, 2, 2)}
        columns |= {"pooled": ones.repeat(1, 3), "label": numbers.long()}
        return Dataset.from_dict({n: c.numpy() for n, c in columns.items()} | {"digest": ["x"] * count}, features)

    whole = concatenate_datasets([part(3, 0), part(2, 3), part(4, 5)]).with_format("torch")
    for dataset, rows in (
        (whole, [8, 0, 3, 3]),
        (whole.select([7, 1, 4]), [2, 0]),
        (whole.select(range(4, 9)), [0, 4]),
    ):
        for columns in (Columns(dataset), pickle.loads(pickle.dumps(Columns(dataset)))):
            found, expected = columns.rows(rows), dataset[rows]
            assert set(found) == set(features) - {"digest"}
            assert all(torch.equal(t, expected[n]) and t.dtype == expected[n].dtype for n, t in found.items())
    assert Columns(whole).rows([], ["label"])["label"].shape == (0,)
    assert Columns(whole).rows([], ["image"])["image"].shape == (0, 2, 1, 3)
    assert Columns(whole).rows([0], []) == {}


def test_the_rows_of_a_batch_are_numbers_that_no_device_is_waited_for(tmp_path):
    trainer = tiny_trainer(tmp_path, train=images_of(4))
    batch = next(iter(trainer.get_train_dataloader()))
    assert isinstance(batch["row"], list) and all(isinstance(row, int) for row in batch["row"])


def test_the_dtype_of_the_denoiser_is_what_diffusers_says_also_after_it_changes(pipeline):
    family, unet = family_of(pipeline), pipeline.unet
    assert family._dtype() == unet.dtype == torch.float32
    unet.to(torch.bfloat16)
    assert family._dtype() == unet.dtype == torch.bfloat16
    unet.to(torch.float32)
    unet.enable_layerwise_casting(torch.float8_e4m3fn, compute_dtype=torch.bfloat16, skip_modules_pattern=["conv_in"])
    assert unet.conv_in.weight.dtype == torch.float32
    assert family._dtype() == unet.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "targets", [{"to_q", "ff.net.2"}, ["conv_in"], ["nothing"], "mid.*to_k"], ids=["set", "list", "none", "pattern"]
)
@pytest.mark.parametrize("others", [{}, {"exclude_modules": ["to_q"]}, {"modules_to_save": ["conv_out"]}], ids=str)
def test_the_modules_that_are_tuned_are_those_that_peft_finds(unet, targets, others):
    config = MemControlConfig(method="svdiff", target_modules=targets, **others)
    for name, _ in unet.named_modules():
        ours = MemControlModel._check_target_module_exists(config, name)
        peft = BaseTuner._check_target_module_exists(config, name)
        assert (bool(ours), type(ours)) == (bool(peft), type(peft))
