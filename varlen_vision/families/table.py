"""The families that come with the library: every packed tower of transformers 4.51 to 5.24."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from varlen_vision.families import inputs
from varlen_vision.families.family import Family, InputsOf, LayoutsOf, no_inputs, no_layouts
from varlen_vision.families.rope import HALF
from varlen_vision.plan import ClipLayout, FrameLayout, Layout


def frames(config: Any) -> dict[str, Layout]:
    """Every layer attends within a frame."""
    return {"frames": FrameLayout()}


def clips(config: Any) -> dict[str, Layout]:
    """Every layer attends within a whole video."""
    return {"clips": ClipLayout()}


def frames_and_windows(config: Any) -> dict[str, Layout]:
    """Some layers attend within a frame, the others within square windows of it."""
    return {"frames": FrameLayout(), "windows": inputs.windows(config)}


def muse_layouts(config: Any) -> dict[str, Layout]:
    """The same, with windows as large as the table of positions."""
    return {"frames": FrameLayout(), "windows": inputs.muse_windows(config)}


def _common(
    name: str,
    label: str,
    stem: str,
    tower: str = "VisionModel",
    *,
    layouts: LayoutsOf = frames,
    plan: InputsOf = inputs.positions,
) -> Family:
    """The most common kind: `<stem>VisionAttention` in `<stem>VisionModel`, within each frame."""
    return Family(name, label, (f"{stem}VisionAttention",), f"{stem}{tower}", layouts, plan)


def _sized(family: Family) -> Family:
    """The same, where the forward also reads the sizes of images on the host."""
    return replace(family, grid_on_host=True)


def _by_segment(name: str, label: str, stem: str, tower: str = "VisionModel") -> Family:
    """The same, where segments do not follow from `grid_thw` by one of the known layouts."""
    return _common(name, label, stem, tower, layouts=no_layouts, plan=no_inputs)


def _audio(name: str, label: str, stem: str, tower: str = "AudioEncoder") -> Family:
    """Chunks of a recording, packed."""
    return Family(name, label, (f"{stem}AudioAttention",), f"{stem}{tower}", modality="audio")


@dataclass(frozen=True)
class _Renamed(Family):
    """A family whose tower was inside of another module in older releases, and other models took only that.

    Attributes:
        older_tower: its class name there.
    """

    older_tower: str = ""

    def is_tower(self, cls: type) -> bool:
        return super().is_tower(cls) or (cls.__module__ == self.module and cls.__name__ == self.older_tower)


BUILT_IN = (
    Family(
        name="qwen2_vl",
        label="Qwen2-VL",
        attention=("VisionAttention", "VisionSdpaAttention", "VisionFlashAttention2"),
        tower="Qwen2VisionTransformerPretrainedModel",
        layouts=frames,
        inputs=inputs.positions,
        rotation=HALF,  # the flash class of 4.51 calls flash-attn's own function
    ),
    Family(
        name="qwen2_5_vl",
        label="Qwen2.5-VL",
        attention=(
            "Qwen2_5_VLVisionAttention",
            "Qwen2_5_VLVisionSdpaAttention",
            "Qwen2_5_VLVisionFlashAttention2",
        ),
        tower="Qwen2_5_VisionTransformerPretrainedModel",
        layouts=frames_and_windows,
        inputs=inputs.positions_and_windows,
        rotation=HALF,
    ),
    Family(
        name="qwen2_5_omni",
        label="Qwen2.5-Omni (vision)",
        attention=("Qwen2_5OmniVisionAttention",),
        tower="Qwen2_5OmniVisionEncoder",
        layouts=frames_and_windows,
        inputs=inputs.positions_and_windows,
    ),
    _audio("qwen2_5_omni_audio", "Qwen2.5-Omni (audio)", "Qwen2_5Omni"),
    _common("qwen3_vl", "Qwen3-VL", "Qwen3VL", plan=inputs.positions_and_table),
    _common("qwen3_vl_moe", "Qwen3-VL-MoE", "Qwen3VLMoe", plan=inputs.positions_and_table),
    _common(
        "qwen3_omni_moe",
        "Qwen3-Omni-MoE (vision)",
        "Qwen3OmniMoe",
        "VisionEncoder",
        plan=inputs.positions_and_table,
    ),
    _audio("qwen3_omni_moe_audio", "Qwen3-Omni-MoE (audio)", "Qwen3OmniMoe"),
    _common("qwen3_5", "Qwen3.5", "Qwen3_5", plan=inputs.positions_and_table),
    _common("qwen3_5_moe", "Qwen3.5-MoE", "Qwen3_5Moe", plan=inputs.positions_and_table),
    _common("qwen4_exp", "Qwen4-Exp", "Qwen4Exp", plan=inputs.positions_and_table),
    _audio("qwen3_asr", "Qwen3-ASR", "Qwen3ASR", "Encoder"),
    _common("glm4v", "GLM-4V", "Glm4v"),
    _common("glm4v_moe", "GLM-4V-MoE", "Glm4vMoe"),
    _common("glm_ocr", "GLM-OCR", "GlmOcr"),
    _common("glm_image", "GLM-Image", "GlmImage"),
    _common("glm5_next", "GLM-5-Next", "Glm5Next"),
    _common("cohere_compass", "Cohere Compass", "CohereCompass", plan=inputs.positions_and_table),
    _common("cosmos3_edge", "Cosmos3-Edge", "Cosmos3Edge", plan=no_inputs),
    _common("dots3_note", "dots3.note", "Dots3Note"),
    _common("ernie4_5_vl_moe", "ERNIE-4.5-VL-MoE", "Ernie4_5_VLMoe", "VisionTransformerPretrainedModel"),
    Family(
        name="exaone4_5",
        label="EXAONE-4.5",
        attention=("Exaone4_5_VisionAttention",),
        tower="Exaone4_5_VisionModel",
        layouts=frames_and_windows,
        inputs=inputs.positions_and_windows,
    ),
    _sized(_common("hunyuan_vl", "HunYuan-VL", "HunYuanVL", "VisionTransformer", plan=no_inputs)),
    _sized(_common("hy_v4_vl", "Hy4-VL", "HYV4VL", plan=no_inputs)),
    _by_segment("inkling2", "Inkling 2", "Inkling2"),
    _common("kimi_k25", "Kimi-K2.5", "Kimi_K25", layouts=clips, plan=inputs.kimi_k25),
    _sized(_common("lfm3_vl", "LFM3-VL", "Lfm3Vl")),
    _by_segment("minicpm_ocr", "MiniCPM-OCR", "MiniCPMOcr"),
    _by_segment("minicpmv4_6", "MiniCPM-V 4.6", "MiniCPMV4_6"),
    _by_segment("minicpmv4_7", "MiniCPM-V 4.7", "MiniCPMV4_7"),
    _common("minimax_m3_vl", "MiniMax-M3-VL", "MiniMaxM3VL", layouts=clips, plan=inputs.minimax_m3_vl),
    _common("muse_glimmer", "Muse Glimmer", "MuseGlimmer", layouts=muse_layouts, plan=inputs.muse_glimmer),
    _common("muse_spark", "Muse Spark", "MuseSpark", layouts=muse_layouts, plan=inputs.muse),
    _common("paddleocr_vl", "PaddleOCR-VL", "PaddleOCR", "VisionTransformer", plan=inputs.paddleocr_vl),
    Family("radio", "RADIO", ("RadioAttention",), "RadioModel"),
    _common("video_llama_3", "VideoLLaMA 3", "VideoLlama3", plan=no_inputs),
    Family(
        name="pixtral",
        label="Pixtral",
        attention=("PixtralAttention",),
        tower="PixtralVisionModel",
        masks="generate_block_attention_mask",
    ),
    _Renamed(
        name="siglip2",
        label="SigLIP 2 (NaFlex)",
        attention=("Siglip2Attention",),
        tower="Siglip2VisionModel",
        padded=True,
        older_tower="Siglip2VisionTransformer",
    ),
)
