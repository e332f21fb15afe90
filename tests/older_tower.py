"""A vision tower as releases of transformers before 5.9 have them, for tests with any release.

It works everything out itself, in methods of the three names of these releases; written image by image, for
reading. Its blocks, and what stands around them, are the installed Qwen2-VL's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.families import make
from varlen_vision import register_family, unregister_family
from varlen_vision.families.inputs import positions_and_table, positions_and_windows
from varlen_vision.families.table import frames_and_windows
from varlen_vision.plan import TowerInput

NAME = "older_tower"


class OwnAttention(type(make("qwen2_vl").blocks[0].attn)):  # type: ignore[misc]
    """A family needs a class of attention that is in no other."""


class Angles(nn.Module):
    """Of so many places, (places, R / 4)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 1 / 10000 ** (torch.arange(0, size, 2) / size))

    def forward(self, places: int) -> Tensor:
        return torch.outer(torch.arange(places, dtype=self.inv_freq.dtype), self.inv_freq)


class OlderTower(nn.Module):
    """Rows in merge units, windows of 2 x 2 units in every block but the last, a table of 5 x 5 positions."""

    def __init__(self) -> None:
        super().__init__()
        parts: Any = make("qwen2_vl")
        channels = parts.patch_embed(torch.zeros(4, parts.patch_embed.proj.weight[0].numel())).shape[1]
        self.config = SimpleNamespace(
            spatial_merge_size=2, patch_size=1, window_size=4, num_position_embeddings=25
        )
        self.patch_embed, self.merger, self.blocks = parts.patch_embed, parts.merger, parts.blocks
        for block in self.blocks:
            block.attn.__class__ = OwnAttention
        self.pos_embed = nn.Embedding(25, channels)
        self.rotary_pos_emb = Angles(channels // parts.blocks[0].attn.num_heads // 2)

    def _by_unit(self, frame: Tensor) -> Tensor:
        """(height, width, ...) -> (height * width, ...), units of 2 x 2 together."""
        height, width = frame.shape[:2]
        rows = frame.view(height // 2, 2, width // 2, 2, *frame.shape[2:])
        return rows.transpose(1, 2).reshape(height * width, *frame.shape[2:])

    def rot_pos_emb(self, grid_thw: Tensor) -> tuple[Tensor, Tensor]:
        found = []
        for frames, height, width in grid_thw.tolist():
            places = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"), -1)
            found.append(self._by_unit(places).repeat(frames, 1))
        position_ids = torch.cat(found)
        return self.rotary_pos_emb(int(grid_thw[:, 1:].max()))[position_ids].flatten(1), position_ids

    def get_window_index(self, grid_thw: Tensor) -> tuple[Tensor, list[int]]:
        order: list[Tensor] = []
        bounds, start = [0], 0
        for frames, height, width in grid_thw.tolist():
            tall, wide = height // 2, width // 2
            for _ in range(frames):
                units = torch.arange(tall * wide).view(tall, wide) + start
                start += tall * wide
                for row in range(0, tall // 2 * 2 + 1, 2):
                    for column in range(0, wide // 2 * 2 + 1, 2):
                        window = units[row : row + 2, column : column + 2].flatten()
                        order.append(window)
                        bounds.append(bounds[-1] + 4 * len(window))
        return torch.cat(order), bounds

    def fast_pos_embed_interpolate(self, grid_thw: Tensor) -> Tensor:
        table, found = self.pos_embed.weight.view(5, 5, -1), []
        for frames, height, width in grid_thw.tolist():
            row, column = torch.linspace(0, 4, height), torch.linspace(0, 4, width)
            (up, left), (down, right) = (row.int(), column.int()), (row.int() + 1, column.int() + 1)
            down, right = down.clip(max=4), right.clip(max=4)
            dy, dx = (row - up)[:, None], (column - left)[None]
            weighed = [
                table[up][:, left] * self.weight((1 - dy) * (1 - dx)),
                table[up][:, right] * self.weight((1 - dy) * dx),
                table[down][:, left] * self.weight(dy * (1 - dx)),
                table[down][:, right] * self.weight(dy * dx),
            ]
            frame = weighed[0] + weighed[1] + weighed[2] + weighed[3]
            found.append(self._by_unit(frame).repeat(frames, 1))
        return torch.cat(found)

    def weight(self, one: Tensor) -> Tensor:
        """(height, width) -> (height, width, 1), in the table's dtype."""
        return one[..., None].to(self.pos_embed.weight.dtype)

    def forward(self, hidden_states: Tensor, grid_thw: Tensor) -> Tensor:
        hidden_states = self.patch_embed(hidden_states) + self.fast_pos_embed_interpolate(grid_thw)
        angles, _ = self.rot_pos_emb(grid_thw)
        window_index, bounds = self.get_window_index(grid_thw)
        cu_window_seqlens = torch.unique_consecutive(torch.tensor(bounds, dtype=torch.int32))
        hidden_states = hidden_states.view(len(window_index), 4, -1)[window_index].flatten(0, 1)
        angles = angles.view(len(window_index), 4, -1)[window_index].flatten(0, 1)
        turns = torch.cat((angles, angles), dim=-1)
        lengths = torch.repeat_interleave(grid_thw[:, 1] * grid_thw[:, 2], grid_thw[:, 0])
        cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        for block in self.blocks:
            cut = cu_seqlens if block is self.blocks[-1] else cu_window_seqlens
            hidden_states = block(
                hidden_states, cu_seqlens=cut, position_embeddings=(turns.cos(), turns.sin())
            )
        return self.merger(hidden_states)[torch.argsort(window_index)]


def older_inputs(config: Any) -> tuple[TowerInput, ...]:
    """What its three methods work out."""
    return (*positions_and_windows(config), *positions_and_table(config)[1:])


@contextmanager
def registered(cls: type[OlderTower] = OlderTower) -> Iterator[None]:
    """The family of such towers, in the table while this lasts."""
    register_family(
        NAME,
        OwnAttention,
        cls,
        layouts=frames_and_windows,
        inputs=older_inputs,
    )
    try:
        yield
    finally:
        unregister_family(NAME)
