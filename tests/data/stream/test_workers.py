"""A batch comes out of its one memory as it went in, whatever the sizes of its tensors."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from iccld.data.stream.stream import TrainingStream
from iccld.data.stream.workers import pack, shared_bytes, unpack
from tests.data.factory import config, layout


@given(st.integers(0, 5), st.integers(1, 5), st.integers(1, 5))
def test_what_is_unpacked_is_what_was_packed(count: int, height: int, width: int) -> None:
    pixels = torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8)
    tensors = {
        "valid": torch.rand(count, height, 1) < 0.5,  # of any number of bytes, before one that must be aligned
        "numbers": torch.arange(count),
        "images": pixels.permute(0, 3, 1, 2),
    }
    batch = {"source": {**tensors, "keys": ["a"]}, "target": {"labels": pixels[..., 0].clone()}}
    packed = pack(batch)
    found = unpack(packed)
    assert {name: part.keys() for name, part in found.items()} == {name: part.keys() for name, part in batch.items()}
    assert found["source"]["keys"] == ["a"]
    for name, key in [*(("source", key) for key in tensors), ("target", "labels")]:
        tensor, expected = found[name][key], batch[name][key]
        assert tensor.dtype == expected.dtype and torch.equal(tensor, expected), key
        assert tensor.stride() == expected.stride(), "in channels-last memory, as it was"
        assert tensor.untyped_storage().data_ptr() == packed.memory.untyped_storage().data_ptr()


def test_what_is_said_to_be_needed_of_shared_memory_is_needed(folders: dict[str, str]) -> None:
    """A batch has both domains; the target's missing labels make it a little smaller."""
    data = config({**folders, "target": folders["source"]}, num_workers=1)
    noise = {"noise": (3, 5, 7)}
    batch = next(TrainingStream(data, seed=0, layout=layout(), target_labels=True, noise=noise).batches(0))
    used = batch["source"]["images"].untyped_storage().nbytes()
    one, two = (shared_bytes(data, micro_batch_size=8, num_held=held, noise=noise) for held in (1, 2))
    assert used <= two - one <= used + 576
    assert shared_bytes(config(folders, num_workers=0), micro_batch_size=8, num_held=2) == 0
