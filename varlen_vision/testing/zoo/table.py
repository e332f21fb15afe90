"""The towers of the zoo, as data.

Each is as small as its structure allows: three layers, but every kind of them (windows, convolutions,
experts, deepstack, a merger in the middle); two heads, or four over two key/value heads where the model
groups them; and the head_dim of the released model, which decides what kernels can run it. Position tables
and windows are small too, so that the images of a batch exceed them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from varlen_vision.testing.zoo import batches
from varlen_vision.testing.zoo.batches import CLIPS, FRAMES, IMAGES, VIDEO, VIDEOS, Batch, Size


@dataclass(frozen=True, eq=False)  # one object per name, so that it can be a key
class Tower:
    """One tower. A release without its classes, or whose attention does not take segments yet, lacks it.

    Attributes:
        name: unique; the folder, followed by `_audio` for the second tower of an omni model.
        tower: class name of the smallest model from pixels (or features) to the last block or the merger.
        attention: class name of its attention.
        config: class name of its config.
        settings: keyword arguments of the config.
        folder: its modules are `transformers.models.<folder>`; the name by default.
        images: sizes of what is in its batch, as its model hands it over; videos too where it takes them.
        batch: makes its inputs.
        output: field of its output that goes on to the language model, or to a merger outside of the tower.
        cut_by: parameter of its attention's forward that cuts the packed sequence into segments.
        needs: another parameter of it, by which a release is known whose `sdpa` attention works.
        otherwise: what is wrong with the releases without it.
    """

    name: str
    tower: str
    attention: str
    config: str
    settings: dict[str, Any]
    folder: str = ""
    images: tuple[Size, ...] = VIDEO
    batch: Batch = batches.rows
    output: str = "pooler_output"
    cut_by: str = "cu_seqlens"
    needs: str = ""
    otherwise: str = ""

    @property
    def modeling(self) -> str:
        folder = self.folder or self.name
        return f"transformers.models.{folder}.modeling_{folder}"

    @property
    def configuration(self) -> str:
        folder = self.folder or self.name
        return f"transformers.models.{folder}.configuration_{folder}"


def _by_depth(head_dim: int, **more: Any) -> dict[str, Any]:
    """Settings in the words of Qwen-VL and its descendants."""
    return {
        "depth": 3,
        "hidden_size": 2 * head_dim,
        "num_heads": 2,
        "intermediate_size": 96,
        "out_hidden_size": 64,
        **more,
    }


def _by_layers(head_dim: int, **more: Any) -> dict[str, Any]:
    """Settings in the words of SigLIP and its descendants."""
    return {
        "num_hidden_layers": 3,
        "hidden_size": 2 * head_dim,
        "num_attention_heads": 2,
        "intermediate_size": 96,
        **more,
    }


def _audio(**more: Any) -> dict[str, Any]:
    """Settings in the words of Whisper and its descendants."""
    return {
        "num_mel_bins": 16,
        "encoder_layers": 3,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 96,
        "d_model": 128,
        "output_dim": 64,
        **more,
    }


_WINDOWS: dict[str, Any] = {"window_size": 112, "fullatt_block_indexes": [1]}
_POSITIONS: dict[str, Any] = {"num_position_embeddings": 64}
_DEEPSTACK: dict[str, Any] = {**_POSITIONS, "deepstack_visual_indexes": [0, 1]}
_MINICPM: dict[str, Any] = {"image_size": 128, "insert_layer_id": 0}
_MUSE: dict[str, Any] = {
    "pos_emb_height": 8,
    "pos_emb_width": 8,
    "max_position_embeddings": 64,
    "layer_types": ["window_attention", "full_attention", "window_attention"],
}

TOWERS: tuple[Tower, ...] = (
    Tower(
        name="cohere_compass",
        tower="CohereCompassVisionModel",
        attention="CohereCompassVisionAttention",
        config="CohereCompassVisionConfig",
        settings=_by_depth(72, **_DEEPSTACK),
        images=IMAGES,
    ),
    Tower(
        name="cosmos3_edge",
        tower="Cosmos3EdgeVisionModel",
        attention="Cosmos3EdgeVisionAttention",
        config="Cosmos3EdgeVisionConfig",
        settings=_by_layers(72, num_patches=64),
    ),
    Tower(
        name="dots3_note",
        tower="Dots3NoteVisionModel",
        attention="Dots3NoteVisionAttention",
        config="Dots3NoteVisionConfig",
        settings=_by_layers(
            64,
            mlp_layer_types=["dense", "sparse", "sparse"],
            moe_intermediate_size=48,
            num_local_experts=4,
            experts_implementation="eager",  # the default has no float64
            per_layer_config={"1": {"num_local_experts": 3}},  # the number of experts grows with depth
            adapter_in_dim=128,
            adapter_out_dim=64,
        ),
    ),
    Tower(
        name="ernie4_5_vl_moe",
        tower="Ernie4_5_VLMoeVisionTransformerPretrainedModel",
        attention="Ernie4_5_VLMoeVisionAttention",
        config="Ernie4_5_VLMoeVisionConfig",
        settings={"depth": 3, "hidden_size": 160, "num_heads": 2, "intermediate_size": 96},
        output="last_hidden_state",
    ),
    Tower(
        name="exaone4_5",
        tower="Exaone4_5_VisionModel",
        attention="Exaone4_5_VisionAttention",
        config="Exaone4_5_VisionConfig",
        settings=_by_depth(64, **_WINDOWS) | {"hidden_size": 256, "num_heads": 4, "num_key_value_heads": 2},
    ),
    Tower(
        name="glm4v",
        tower="Glm4vVisionModel",
        attention="Glm4vVisionAttention",
        config="Glm4vVisionConfig",
        # As checkpoints have it; the default of transformers 4.53 is 1.
        settings=_by_depth(128, image_size=112, temporal_patch_size=2),
        images=FRAMES,
    ),
    Tower(
        name="glm4v_moe",
        tower="Glm4vMoeVisionModel",
        attention="Glm4vMoeVisionAttention",
        config="Glm4vMoeVisionConfig",
        settings=_by_depth(128, image_size=112),
        images=FRAMES,
    ),
    Tower(
        name="glm5_next",
        tower="Glm5NextVisionModel",
        attention="Glm5NextVisionAttention",
        config="Glm5NextVisionConfig",
        settings=_by_depth(64, projection_intermediate_size=96),
        images=FRAMES,
    ),
    Tower(
        name="glm_image",
        tower="GlmImageVisionModel",
        attention="GlmImageVisionAttention",
        config="GlmImageVisionConfig",
        settings={"depth": 3, "hidden_size": 192, "num_heads": 2, "intermediate_size": 96, "image_size": 128},
        images=IMAGES,
    ),
    Tower(
        name="glm_ocr",
        tower="GlmOcrVisionModel",
        attention="GlmOcrVisionAttention",
        config="GlmOcrVisionConfig",
        settings=_by_depth(64),
        images=FRAMES,
    ),
    Tower(
        name="hunyuan_vl",
        tower="HunYuanVLVisionTransformer",
        attention="HunYuanVLVisionAttention",
        config="HunYuanVLVisionConfig",
        settings=_by_layers(72, num_key_value_heads=2, max_image_size=128, text_hidden_size=64),
        images=IMAGES,
    ),
    Tower(
        name="hy_v4_vl",
        tower="HYV4VLVisionModel",
        attention="HYV4VLVisionAttention",
        config="HYV4VLVisionConfig",
        settings=_by_layers(96, max_image_size=128, out_hidden_size=64),
    ),
    Tower(
        name="inkling2",
        tower="Inkling2VisionModel",
        attention="Inkling2VisionAttention",
        config="Inkling2VisionConfig",
        settings=_by_layers(64, posemb_grid_size=8, projection_hidden_dim=96, text_hidden_size=64),
        images=IMAGES,
        batch=batches.merge_units,
    ),
    Tower(
        name="kimi_k25",
        tower="Kimi_K25VisionModel",
        attention="Kimi_K25VisionAttention",
        config="Kimi_K25VisionConfig",
        settings=_by_layers(72, pos_emb_height=8, pos_emb_width=8),
        images=VIDEOS,  # its merger takes no images beside videos
        batch=batches.squares,
    ),
    Tower(
        name="lfm3_vl",
        tower="Lfm3VlVisionModel",
        attention="Lfm3VlVisionAttention",
        config="Lfm3VlVisionConfig",
        settings=_by_layers(64, layer_types=["conv", "full_attention", "full_attention"])
        | {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2},
    ),
    Tower(
        name="minicpm_ocr",
        tower="MiniCPMOcrVisionModel",
        attention="MiniCPMOcrVisionAttention",
        config="MiniCPMOcrVisionConfig",
        settings=_by_layers(64, **_MINICPM),
        images=IMAGES,
        batch=batches.strip,
    ),
    Tower(
        name="minicpmv4_6",
        tower="MiniCPMV4_6VisionModel",
        attention="MiniCPMV4_6VisionAttention",
        config="MiniCPMV4_6VisionConfig",
        settings=_by_layers(72, **_MINICPM),
        images=IMAGES,
        batch=batches.strip,
    ),
    Tower(
        name="minicpmv4_7",
        tower="MiniCPMV4_7VisionModel",
        attention="MiniCPMV4_7VisionAttention",
        config="MiniCPMV4_7VisionConfig",
        settings=_by_layers(72, **_MINICPM),
        images=IMAGES,
        batch=batches.strip,
    ),
    Tower(
        name="minimax_m3_vl",
        tower="MiniMaxM3VLVisionModel",
        attention="MiniMaxM3VLVisionAttention",
        config="MiniMaxM3VLVisionConfig",
        settings=_by_layers(80),
        output="last_hidden_state",  # its pooler_output is the first patch of all
    ),
    Tower(
        name="muse_glimmer",
        tower="MuseGlimmerVisionModel",
        attention="MuseGlimmerVisionAttention",
        config="MuseGlimmerVisionConfig",
        settings=_by_layers(96, **_MUSE),
        output="last_hidden_state",
    ),
    Tower(
        name="muse_spark",
        tower="MuseSparkVisionModel",
        attention="MuseSparkVisionAttention",
        config="MuseSparkVisionConfig",
        settings=_by_layers(96, **_MUSE),
        output="last_hidden_state",
    ),
    Tower(
        name="paddleocr_vl",
        tower="PaddleOCRVisionTransformer",
        attention="PaddleOCRVisionAttention",
        config="PaddleOCRVisionConfig",
        settings=_by_layers(72, image_size=112),
        images=IMAGES,
        batch=batches.squares_behind_one,
        output="last_hidden_state",
    ),
    Tower(
        name="pixtral",
        tower="PixtralVisionModel",
        attention="PixtralAttention",
        config="PixtralVisionConfig",
        settings=_by_layers(64, image_size=288),
        images=IMAGES,
        batch=batches.padded,
        output="last_hidden_state",
        cut_by="attention_mask",
    ),
    Tower(
        name="qwen2_vl",
        tower="Qwen2VisionTransformerPretrainedModel",
        attention="VisionAttention",
        config="Qwen2VLVisionConfig",
        settings={"depth": 3, "embed_dim": 160, "num_heads": 2, "mlp_ratio": 1, "hidden_size": 64},
    ),
    Tower(
        name="qwen2_5_vl",
        tower="Qwen2_5_VisionTransformerPretrainedModel",
        attention="Qwen2_5_VLVisionAttention",
        config="Qwen2_5_VLVisionConfig",
        settings=_by_depth(80, **_WINDOWS),
    ),
    Tower(
        name="qwen2_5_omni",
        tower="Qwen2_5OmniVisionEncoder",
        attention="Qwen2_5OmniVisionAttention",
        config="Qwen2_5OmniVisionEncoderConfig",
        settings=_by_depth(80, **_WINDOWS),
    ),
    Tower(
        name="qwen2_5_omni_audio",
        folder="qwen2_5_omni",
        tower="Qwen2_5OmniAudioEncoder",
        attention="Qwen2_5OmniAudioAttention",
        config="Qwen2_5OmniAudioEncoderConfig",
        settings=_audio(n_window=25),
        images=CLIPS,
        batch=batches.clips,
        output="last_hidden_state",
    ),
    Tower(
        name="qwen3_vl",
        tower="Qwen3VLVisionModel",
        attention="Qwen3VLVisionAttention",
        config="Qwen3VLVisionConfig",
        settings=_by_depth(72, **_DEEPSTACK),
    ),
    Tower(
        name="qwen3_vl_moe",
        tower="Qwen3VLMoeVisionModel",
        attention="Qwen3VLMoeVisionAttention",
        config="Qwen3VLMoeVisionConfig",
        settings=_by_depth(72, **_DEEPSTACK),
    ),
    Tower(
        name="qwen3_5",
        tower="Qwen3_5VisionModel",
        attention="Qwen3_5VisionAttention",
        config="Qwen3_5VisionConfig",
        settings=_by_depth(72, **_POSITIONS),
    ),
    Tower(
        name="qwen3_5_moe",
        tower="Qwen3_5MoeVisionModel",
        attention="Qwen3_5MoeVisionAttention",
        config="Qwen3_5MoeVisionConfig",
        settings=_by_depth(72, **_POSITIONS),
    ),
    Tower(
        name="qwen3_omni_moe",
        tower="Qwen3OmniMoeVisionEncoder",
        attention="Qwen3OmniMoeVisionAttention",
        config="Qwen3OmniMoeVisionEncoderConfig",
        settings=_by_depth(72, **_DEEPSTACK),
    ),
    Tower(
        name="qwen3_omni_moe_audio",
        folder="qwen3_omni_moe",
        tower="Qwen3OmniMoeAudioEncoder",
        attention="Qwen3OmniMoeAudioAttention",
        config="Qwen3OmniMoeAudioEncoderConfig",
        # Before (5.5, not 5.17) only flash attention kept the clips apart: with sdpa all see each other.
        needs="max_seqlen",
        otherwise="under sdpa the clips of a batch see each other in transformers' own encoder: it hands "
        "cu_seqlens to layers that use a mask, and makes no mask. A swapped encoder keeps clips apart, so "
        "there is nothing right to compare it with",
        settings=_audio(n_window=50, n_window_infer=200, downsample_hidden_size=8),
        images=CLIPS,
        batch=batches.clips,
        output="last_hidden_state",
    ),
    Tower(
        name="qwen3_asr",
        tower="Qwen3ASREncoder",
        attention="Qwen3ASRAudioAttention",
        config="Qwen3ASREncoderConfig",
        settings=_audio(n_window=50, n_window_infer=200, downsample_hidden_size=8),
        images=CLIPS,
        batch=batches.padded_clips,
        output="last_hidden_state",
    ),
    Tower(
        name="qwen4_exp",
        tower="Qwen4ExpVisionModel",
        attention="Qwen4ExpVisionAttention",
        config="Qwen4ExpVisionConfig",
        settings=_by_depth(72, **_POSITIONS),
    ),
    Tower(
        name="radio",
        tower="RadioModel",
        attention="RadioAttention",
        config="RadioConfig",
        # Pixels come with unit variance already; images span 8 to 18 of the 12 positions per side.
        settings={
            "hidden_size": 160,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "mlp_ratio": 0.6,
            "max_img_size": 192,
            "norm_mean": [0.0, 0.0, 0.0],
            "norm_std": [1.0, 1.0, 1.0],
        },
        images=IMAGES,
        batch=batches.rows_of_images,
        output="features",
    ),
    Tower(
        name="video_llama_3",
        tower="VideoLlama3VisionModel",
        attention="VideoLlama3VisionAttention",
        config="VideoLlama3VisionConfig",
        settings=_by_layers(72),
        batch=batches.rows_merging_videos,
        output="last_hidden_state",
    ),
)

PADDED: tuple[Tower, ...] = (
    Tower(
        name="siglip2",
        tower="Siglip2VisionModel",
        attention="Siglip2Attention",
        config="Siglip2VisionConfig",
        settings=_by_layers(72, num_patches=64, patch_size=16),
        images=IMAGES,
        batch=batches.padded_rows,
        cut_by="attention_mask",
    ),
)
"""Towers whose batches are padded, not packed: `cut_by` is the mask over the padding."""
