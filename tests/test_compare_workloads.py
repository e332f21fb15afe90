"""What is measured on: sizes, folders of one's own, bad images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from tests.towers import checkpoint
from varlen_vision.compare.attention import LENGTHS
from varlen_vision.compare.errors import CompareError
from varlen_vision.compare.workloads import MIXED_16, RECIPES, fit, folder_workload, grids_of, make_workloads
from varlen_vision.testing.photographs import photograph


@pytest.fixture(scope="module")
def processor() -> Any:
    return AutoImageProcessor.from_pretrained(checkpoint("qwen2_5_vl", vision_only=True))


def test_built_in_workloads_of_the_cpu(processor: Any) -> None:
    made = make_workloads((), "cpu", processor)
    assert [(work.name, work.patches) for work in made] == [("small", 1024), ("mixed", 3344), ("video", 2048)]
    assert made[2].grids == [(8, 16, 16)]
    for work in made:
        assert work.patches == sum(t * h * w for t, h, w in work.grids) == len(work.pixel_values)
        assert work.pixel_values.std() > 0.1, "a photograph, not zeros"


def test_built_in_workloads_of_a_gpu_have_the_sizes_that_were_measured() -> None:
    patches = {}
    for recipe in RECIPES["cuda"]:
        grids = grids_of(recipe.sizes, patch=14, merge=2)
        patches[recipe.name] = sum(h * w for _, h, w in grids) * max(1, recipe.frames // 2)
    assert patches == {"small": 1024, "large": 6144, "batch": 49152, "mixed": 56796, "video": 32768}
    assert len(MIXED_16) == len(set(MIXED_16)) == 16


def test_lists_for_attention_alone() -> None:
    for device, wanted in (("cpu", 96), ("cuda", 768)):
        lists = {case.name: case.lengths for case in LENGTHS[device]}
        assert lists[f"{wanted} windows of 64"] == (64,) * wanted
        assert lists["1 x 6144"] == (6144,) and lists["1 x 1024"] == (1024,)
    assert sum(dict((c.name, c.lengths) for c in LENGTHS["cuda"])["windows of 16 photographs"]) == 56796
    assert len(set(dict((c.name, c.lengths) for c in LENGTHS["cpu"])["windows of 3 photographs"])) > 3


@pytest.mark.parametrize(
    ("size", "unit", "fitted"),
    [((448, 448), 28, (448, 448)), ((640, 480), 28, (644, 476)), ((5, 1000), 32, (32, 992))],
)
def test_sides_are_whole_merge_units(size: tuple[int, int], unit: int, fitted: tuple[int, int]) -> None:
    assert fit(size, unit) == fitted


def test_a_folder_is_one_batch_of_all_its_images(processor: Any, tmp_path: Path) -> None:
    photograph("coffee", 168, 112).save(tmp_path / "b.png")
    photograph("rocket", 56, 84).convert("L").save(tmp_path / "a.jpg")
    (tmp_path / ".hidden").write_text("not an image")
    work = folder_workload(tmp_path, processor)
    assert work.grids == [(1, 6, 4), (1, 8, 12)], "in order of their names, gray ones too"
    assert work.patches == 120 and work.name == tmp_path.name
    assert "2 images" in work.description


def test_an_empty_folder_is_named(processor: Any, tmp_path: Path) -> None:
    with pytest.raises(CompareError, match=f"{tmp_path.name}.* has no files"):
        folder_workload(tmp_path, processor)


@pytest.mark.parametrize(
    "content", [b"hello", photograph("coffee").tobytes()[:100], b"\x89PNG\r\n\x1a\nxxxx"]
)
def test_an_unreadable_image_is_named(processor: Any, tmp_path: Path, content: bytes) -> None:
    photograph("coffee", 112, 112).save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes(content)
    with pytest.raises(CompareError, match=r"broken\.png' could not be read"):
        folder_workload(tmp_path, processor)


def test_a_truncated_image_is_named(processor: Any, tmp_path: Path) -> None:
    photograph("coffee", 112, 112).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CompareError, match=r"cut\.png' could not be read"):
        folder_workload(tmp_path, processor)


def test_an_image_that_the_processor_refuses_is_named(processor: Any, tmp_path: Path) -> None:
    photograph("coffee", 112, 112).save(tmp_path / "a.png")
    photograph("coffee", 2000, 4).save(tmp_path / "wide.png")
    with pytest.raises(CompareError, match=r"image 1: .*wide\.png', \(2000, 4\): .* says: "):
        folder_workload(tmp_path, processor)


def test_the_folder_that_one_is_in_has_its_name(
    processor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photograph("coffee", 112, 112).save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    work = folder_workload(Path("."), processor)
    assert work.name == tmp_path.name and work.description.endswith(tmp_path.name)
