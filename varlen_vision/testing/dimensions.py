"""The model families a checkpoint can be written for, as data: class names, dimensions and pixel statistics.

The `real` figures are those of config.json and preprocessor_config.json of the released models on the hub,
named in `Family.released`. The `tiny` ones keep the structure (windows and full-attention layers, deepstack,
experts, grouped key/value heads) and everything that shapes the input (patches, merging, windows), and shrink
the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Size = Literal["tiny", "real"]
Dimensions = dict[str, Any]

SIZES: tuple[Size, ...] = ("tiny", "real")


@dataclass(frozen=True)
class Family:
    """One model family; its key in FAMILIES is the model_type of transformers and names its modelling module.

    Attributes:
        released: the model on the hub whose dimensions `real` has.
        vision_class: the class of the vision tower in transformers' modelling module of the family.
        vision: keyword arguments of the vision config, per size.
        text: keyword arguments of the text config, per size. Rotary settings are written as in config.json on
            the hub (rope_theta, rope_scaling), which every version of transformers reads.
        nested_text: whether config.json holds the text config under text_config (from Qwen3-VL on) or flat.
        image_mean, image_std: per channel, of pixels in 0..1.
        min_pixels, max_pixels: the area to which the processor scales images.
        video_processor: class of the video processor, which transformers offers only beside torchvision.
    """

    released: str
    vision_class: str
    vision: dict[Size, Dimensions]
    text: dict[Size, Dimensions]
    nested_text: bool
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    min_pixels: int
    max_pixels: int
    video_processor: str


# What all released models of a generation share.
_QWEN2_VISION: Dimensions = {
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
}
_QWEN3_VISION: Dimensions = {**_QWEN2_VISION, "patch_size": 16, "num_position_embeddings": 2304}
_QWEN2_PIXELS: Dimensions = {
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
    "min_pixels": 56 * 56,
    "max_pixels": 28 * 28 * 16384,
    "video_processor": "Qwen2VLVideoProcessor",
}
_QWEN3_PIXELS: Dimensions = {
    "image_mean": (0.5, 0.5, 0.5),
    "image_std": (0.5, 0.5, 0.5),
    "min_pixels": 256 * 256,
    "max_pixels": 4096 * 4096,
    "video_processor": "Qwen3VLVideoProcessor",
}

_QWEN2_TEXT_TINY: Dimensions = {
    "vocab_size": 272,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
}
# Text part of Qwen2-VL-7B-Instruct and of Qwen2.5-VL-7B-Instruct, but for max_position_embeddings.
_QWEN2_TEXT_7B: Dimensions = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
}
_QWEN3_TEXT_TINY: Dimensions = {
    **_QWEN2_TEXT_TINY,
    "head_dim": 32,
    "max_position_embeddings": 262144,
    "rope_theta": 5e6,
    "rope_scaling": {"rope_type": "default", "mrope_section": [6, 5, 5], "mrope_interleaved": True},
}
# Qwen3-VL-8B-Instruct.
_QWEN3_TEXT_8B: Dimensions = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5e6,
    "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True},
}
# Qwen3-VL-30B-A3B-Instruct, where it differs from Qwen3-VL-8B-Instruct.
_QWEN3_TEXT_30B_A3B: Dimensions = {
    **_QWEN3_TEXT_8B,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}
_QWEN3_VISION_TINY: Dimensions = {
    **_QWEN3_VISION,
    "depth": 4,
    "hidden_size": 72,
    "num_heads": 2,
    "intermediate_size": 144,
    "out_hidden_size": 64,
    "deepstack_visual_indexes": [1, 2],
}
# Qwen3-VL-8B-Instruct and Qwen3-VL-30B-A3B-Instruct, but for out_hidden_size.
_QWEN3_VISION_REAL: Dimensions = {
    **_QWEN3_VISION,
    "depth": 27,
    "hidden_size": 1152,
    "num_heads": 16,
    "intermediate_size": 4304,
    "deepstack_visual_indexes": [8, 16, 24],
}

FAMILIES: dict[str, Family] = {
    "qwen2_vl": Family(
        released="Qwen/Qwen2-VL-7B-Instruct",
        vision_class="Qwen2VisionTransformerPretrainedModel",
        vision={
            "tiny": {
                **_QWEN2_VISION,
                "depth": 4,
                "embed_dim": 80,
                "num_heads": 2,
                "mlp_ratio": 2,
                "hidden_size": 64,
            },
            "real": {
                **_QWEN2_VISION,
                "depth": 32,
                "embed_dim": 1280,
                "num_heads": 16,
                "mlp_ratio": 4,
                "hidden_size": 3584,
            },
        },
        text={"tiny": _QWEN2_TEXT_TINY, "real": {**_QWEN2_TEXT_7B, "max_position_embeddings": 32768}},
        nested_text=False,
        **_QWEN2_PIXELS,
    ),
    "qwen2_5_vl": Family(
        released="Qwen/Qwen2.5-VL-7B-Instruct",
        vision_class="Qwen2_5_VisionTransformerPretrainedModel",
        vision={
            "tiny": {
                **_QWEN2_VISION,
                "depth": 4,
                "hidden_size": 80,
                "num_heads": 2,
                "intermediate_size": 160,
                "out_hidden_size": 64,
                "window_size": 112,
                "fullatt_block_indexes": [1, 3],
                "tokens_per_second": 2,
            },
            "real": {
                **_QWEN2_VISION,
                "depth": 32,
                "hidden_size": 1280,
                "num_heads": 16,
                "intermediate_size": 3420,
                "out_hidden_size": 3584,
                "window_size": 112,
                "fullatt_block_indexes": [7, 15, 23, 31],
                "tokens_per_second": 2,
            },
        },
        text={"tiny": _QWEN2_TEXT_TINY, "real": {**_QWEN2_TEXT_7B, "max_position_embeddings": 128000}},
        nested_text=False,
        **_QWEN2_PIXELS,
    ),
    "qwen3_vl": Family(
        released="Qwen/Qwen3-VL-8B-Instruct",
        vision_class="Qwen3VLVisionModel",
        vision={"tiny": _QWEN3_VISION_TINY, "real": {**_QWEN3_VISION_REAL, "out_hidden_size": 4096}},
        text={"tiny": _QWEN3_TEXT_TINY, "real": _QWEN3_TEXT_8B},
        nested_text=True,
        **_QWEN3_PIXELS,
    ),
    "qwen3_vl_moe": Family(
        released="Qwen/Qwen3-VL-30B-A3B-Instruct",
        vision_class="Qwen3VLMoeVisionModel",
        vision={"tiny": _QWEN3_VISION_TINY, "real": {**_QWEN3_VISION_REAL, "out_hidden_size": 2048}},
        text={
            "tiny": {
                **_QWEN3_TEXT_TINY,
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 32,
                "decoder_sparse_step": 1,
                "mlp_only_layers": [],
                "norm_topk_prob": True,
            },
            "real": _QWEN3_TEXT_30B_A3B,
        },
        nested_text=True,
        **_QWEN3_PIXELS,
    ),
}
