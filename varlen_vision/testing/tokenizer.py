"""Tokenizer and chat template of the checkpoints: bytes, Qwen's special tokens, and ChatML.

The vocabulary has no merges, so every byte of text is one token. Only files that every version of
transformers reads for a Qwen2 tokenizer are written: vocab.json, merges.txt, tokenizer_config.json and
chat_template.jinja.
"""

from __future__ import annotations

import json
from pathlib import Path

SPECIAL_TOKENS: tuple[str, ...] = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

FIRST_SPECIAL_ID = {"tiny": 256, "real": 151643}
"""Where the special tokens begin: after the bytes, or as in tokenizer_config.json of the released models."""

CHAT_TEMPLATE = """\
{%- for message in messages -%}
  {{- '<|im_start|>' ~ message.role ~ '\\n' -}}
  {%- if message.content is string -%}
    {{- message.content -}}
  {%- else -%}
    {%- for part in message.content -%}
      {%- if part.type == 'image' -%}
        {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
      {%- elif part.type == 'video' -%}
        {{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
      {%- else -%}
        {{- part.text -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def token_ids(size: str) -> dict[str, int]:
    """Id of every special token at one size ("tiny" or "real")."""
    return {token: FIRST_SPECIAL_ID[size] + index for index, token in enumerate(SPECIAL_TOKENS)}


def write_tokenizer(directory: Path, size: str) -> None:
    """Write the tokenizer's files and the chat template into an existing directory."""
    symbols = [chr(code) for code in _byte_symbols()]
    # The ids between bytes and special tokens exist so that any id the model generates can be decoded.
    fillers = [f"<filler {index}>" for index in range(len(symbols), FIRST_SPECIAL_ID[size])]
    vocabulary = {symbol: index for index, symbol in enumerate(symbols + fillers)}
    _write_json(directory / "vocab.json", vocabulary)
    (directory / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    added = {
        str(index): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for token, index in token_ids(size).items()
    }
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "added_tokens_decoder": added,
            "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "unk_token": None,
            "errors": "replace",
            "clean_up_tokenization_spaces": False,
            "model_max_length": 131072,
        },
    )


def _byte_symbols() -> list[int]:
    """Code point that stands for each byte in a byte-level BPE vocabulary (the GPT-2 convention).

    Bytes that print stand for themselves; the others get the code points from 256 on, in order.
    """
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    spare = iter(range(256, 512))
    return [byte if byte in printable else next(spare) for byte in range(256)]


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")
