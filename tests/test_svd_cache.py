"""The decomposition of a large weight is computed once on a machine."""

import os
import threading

import pytest
import torch

from memcontrol_hf.tuners import svd


def weight(seed: int = 0, shape: tuple[int, ...] = (16, 20), dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MEMCONTROL_SVD_CACHE", str(tmp_path / "svd"))
    monkeypatch.setattr(svd, "LEAST_KEPT", 16)
    return tmp_path / "svd"


@pytest.fixture
def computed(monkeypatch):
    """The weights that were decomposed."""
    weights, decomposed = [], svd._decomposed
    monkeypatch.setattr(svd, "_decomposed", lambda values: weights.append(values) or decomposed(values))
    return weights


def factors(*args, **kwargs):
    """The factors as a process finds them that has not read them before."""
    found = svd.svd_factors(weight(*args, **kwargs))
    return found.u.clone(), found.s.clone(), found.vh.clone()


@pytest.mark.parametrize("shape", [(16, 20), (24, 16), (16, 4, 2, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_read_is_what_was_computed(folder, computed, shape, dtype):
    first = factors(shape=shape, dtype=dtype)
    assert all(map(torch.equal, first, factors(shape=shape, dtype=dtype))) and len(computed) == 1
    assert all(map(torch.equal, first, svd._decomposed(weight(shape=shape, dtype=dtype))))
    assert oct(folder.stat().st_mode)[-3:] == "700"
    assert {oct(file.stat().st_mode)[-3:] for file in folder.iterdir()} == {"600"}


def test_other_values_shapes_and_dtypes_have_files_of_their_own(folder, computed):
    factors(), factors(1), factors(shape=(20, 16)), factors(dtype=torch.float16)
    assert len(computed) == 4 and len(list(folder.glob("*.safetensors"))) == 4


def test_a_small_weight_leaves_no_file(folder, computed):
    factors(shape=(15, 40)), factors(shape=(15, 40))
    assert len(computed) == 2 and not folder.exists()


def _cut(file):
    file.write_bytes(file.read_bytes()[:-9])


def _flip(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def _of_another(file):
    factors(shape=(24, 16))
    os.replace(next(other for other in file.parent.glob("*24x16*")), file)


@pytest.mark.parametrize("damage", [_cut, _flip, _of_another, lambda file: file.write_bytes(b"")], ids=range(4))
def test_a_damaged_file_is_computed_again_and_replaced(folder, computed, damage, caplog):
    first = factors()
    damage(next(folder.glob("*16x20*")))
    computed.clear()
    with caplog.at_level("WARNING"):
        assert all(map(torch.equal, first, factors())) and len(computed) == 1
    assert "is damaged" in caplog.text
    assert all(map(torch.equal, first, factors())) and len(computed) == 1


@pytest.mark.parametrize("obstacle", ["no folder", "full disk"])
def test_what_cannot_be_kept_is_computed(folder, computed, monkeypatch, obstacle):
    if obstacle == "no folder":
        folder.write_text("a file is in the way")
    else:
        monkeypatch.setattr("memcontrol_hf.whole_files.shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    assert all(map(torch.equal, factors(), factors())) and len(computed) == 2
    assert folder.is_file() or not list(folder.glob("*.safetensors"))


def test_those_who_come_at_the_same_time_wait_for_the_first(folder, computed):
    values = [weight() for _ in range(3)]
    threads = [threading.Thread(target=svd._kept, args=(each, "same")) for each in values]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(computed) == 1


def test_factors_that_are_read_first_in_inference_mode_can_be_trained_with(folder):
    factors()
    with torch.inference_mode():
        found = svd.svd_factors(weight())
    delta = torch.zeros(16, requires_grad=True)
    found.difference(delta, 1.0).sum().backward()
    assert delta.grad is not None
