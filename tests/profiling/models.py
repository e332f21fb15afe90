"""Small vision models that make the host wait in known lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MaskedAttention(nn.Module):
    """As VisionSdpaAttention of transformers 4.51 (modeling_qwen2_5_vl.py), without RoPE."""

    def __init__(self, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.qkv, self.proj, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def forward(self, hidden_states: Tensor, cu_seqlens: Tensor) -> Tensor:
        seq_length = hidden_states.shape[0]
        q, k, v = self.qkv(hidden_states).reshape(seq_length, 3, self.heads, -1).permute(1, 2, 0, 3).unbind(0)
        attention_mask = torch.zeros([1, seq_length, seq_length], device=q.device, dtype=torch.bool)
        for i in range(1, len(cu_seqlens)):
            attention_mask[..., cu_seqlens[i - 1] : cu_seqlens[i], cu_seqlens[i - 1] : cu_seqlens[i]] = True
        attn_output = F.scaled_dot_product_attention(
            q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), attention_mask, dropout_p=0.0
        )
        return self.proj(attn_output.squeeze(0).transpose(0, 1).reshape(seq_length, -1))


class Block(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.attn = MaskedAttention(width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU())

    def forward(self, hidden_states: Tensor, cu_seqlens: Tensor) -> Tensor:
        return self.mlp(hidden_states + self.attn(hidden_states, cu_seqlens))


class Tower451(nn.Module):
    """Blocks with the mask of transformers 4.51."""

    def __init__(self, layers: int = 3, width: int = 32) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(width) for _ in range(layers)])

    def forward(self, hidden_states: Tensor, cu_seqlens: Tensor) -> Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states, cu_seqlens)
        return hidden_states


def line_of(cls: type, text: str) -> tuple[str, int]:
    """File and number of the only line of a class that has `text`."""
    import inspect

    lines, start = inspect.getsourcelines(cls)
    found = [start + index for index, line in enumerate(lines) if text in line]
    assert len(found) == 1, (text, found)
    return inspect.getsourcefile(cls) or "", found[0]


_SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 16,
}
_TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def write_unpacked(name: str, folder: Path) -> Path:
    """A checkpoint of a model without packed attention: 'siglip', 'siglip_vision', 'clip' or 'dinov2'."""
    import transformers as hf

    vision = {**_SMALL, "intermediate_size": 96}
    models = {
        "siglip_vision": lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**vision)),
        "siglip": lambda: hf.SiglipModel(hf.SiglipConfig(text_config=dict(_TEXT), vision_config=vision)),
        "clip": lambda: hf.CLIPModel(hf.CLIPConfig(text_config=dict(_TEXT), vision_config=vision)),
        "dinov2": lambda: hf.Dinov2Model(hf.Dinov2Config(**_SMALL)),
    }
    processors = {"clip": "CLIPImageProcessor", "dinov2": "BitImageProcessor"}
    models[name]().save_pretrained(folder)
    square = {"height": 64, "width": 64}
    settings: dict[str, Any] = {
        "image_processor_type": processors.get(name, "SiglipImageProcessor"),
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "size": square if name.startswith("siglip") else {"shortest_edge": 64},
    }
    if not name.startswith("siglip"):
        settings |= {"crop_size": square, "do_center_crop": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder
