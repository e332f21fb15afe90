"""What is saved of an optimised tower is whole, whoever saves it, and loads again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, load_model, save_model

from tests.surroundings.same import assert_same, run
from tests.tower.odd import GATED, PLAIN, odd_tower, optimized_tower
from varlen_vision import restore_vision


@pytest.fixture(params=[GATED, PLAIN])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_the_state_is_in_pieces_over_the_same_memory(name: str) -> None:
    """Tools take tensors of one storage for one tensor, and write the first (accelerate 1.15)."""
    model = optimized_tower(name)
    state, parameters = model.state_dict(), dict(model.named_parameters())
    storages = [state[key].untyped_storage() for key in parameters]
    assert len({storage.data_ptr() for storage in storages}) == len(parameters)
    for (key, parameter), storage in zip(parameters.items(), storages, strict=True):
        assert storage.nbytes() == parameter.nbytes
        assert state[key].data_ptr() == parameter.data_ptr()
        assert state[key].stride() == parameter.stride()
        assert not state[key].requires_grad
    assert all(model.state_dict(keep_vars=True)[key] is parameter for key, parameter in parameters.items())
    with torch.no_grad():
        for value in state.values():
            value.mul_(0.9)
        other = odd_tower(name)
        for tensor in other.state_dict().values():
            tensor.mul_(0.9)
        assert_same(run(name, model), run(name, other))


def test_the_state_of_a_part_of_it_or_with_a_prefix(name: str) -> None:
    block, plain = optimized_tower(name).blocks[0], odd_tower(name).blocks[0]  # type: ignore[index]
    for part, expected in ((block, plain), (block.mlp, plain.mlp)):
        for prefix in ("", "some.where."):
            state, theirs = part.state_dict(prefix=prefix), expected.state_dict(prefix=prefix)
            assert list(state) == list(theirs)
            assert len({value.untyped_storage().data_ptr() for value in state.values()}) == len(state)


def test_accelerate(name: str, tmp_path: Path) -> None:
    model, expected = optimized_tower(name), odd_tower(name).state_dict()
    accelerator = Accelerator(cpu=True)
    accelerator.save_model(model, str(tmp_path / "model"))
    written = load_file(tmp_path / "model" / "model.safetensors")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[key], value) for key, value in expected.items())
    prepared = accelerator.prepare(model)
    accelerator.save_state(str(tmp_path / "state"))
    with torch.no_grad():
        for parameter in prepared.parameters():
            parameter.zero_()
        accelerator.load_state(str(tmp_path / "state"))
        assert_same(run(name, prepared), run(name, odd_tower(name)))


def test_safetensors(name: str, tmp_path: Path) -> None:
    save_model(optimized_tower(name), str(tmp_path / "model.safetensors"))
    for other in (odd_tower(name), optimized_tower(name)):
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
            load_model(other, str(tmp_path / "model.safetensors"))
            assert_same(run(name, other), run(name, odd_tower(name)))


def test_torch_save_writes_no_more_than_the_weights(name: str, tmp_path: Path) -> None:
    sizes = []
    for which, model in (("plain", odd_tower(name)), ("optimised", optimized_tower(name))):
        torch.save(model.state_dict(), tmp_path / which)
        sizes.append((tmp_path / which).stat().st_size)
        model.load_state_dict(torch.load(tmp_path / which))
    assert sizes[1] <= sizes[0] * 1.01


@torch.no_grad()
def test_of_a_tower_given_back(name: str) -> None:
    model = optimized_tower(name)
    restore_vision(model)
    state = model.state_dict()
    assert all(value.is_contiguous() for value in state.values())
    assert all(state[key].untyped_storage().data_ptr() == p.data_ptr() for key, p in model.named_parameters())
