"""Bad input: every item has a result or a clear error, the account says so, the exit status tells."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.jobs.commands import call, photographs
from tests.jobs.fake import Fake, do, pictures
from tests.jobs.outcome import rows_of, table_of
from varlen_vision.errors import ImageError, JobError
from varlen_vision.jobs.decode import decode
from varlen_vision.jobs.formats import Parquet
from varlen_vision.jobs.items import read_source
from varlen_vision.testing.photographs import photograph

pytest.importorskip("skimage")


def test_all_kinds_of_bad_images(tmp_path: Path) -> None:
    """Those that can be used are used, the others are errors of their own, and the rest goes on."""
    folder = photographs(tmp_path / "in", 2)
    photo = photograph("coffee", 120, 80)
    photo.save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:-800])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("no image at all")
    Image.new("L", (20_000, 100)).save(folder / "wide.png")
    Image.new("L", (30_000, 100)).save(folder / "wider.png")
    Image.new("L", (1, 1)).save(folder / "dot.png")
    Image.new("1", (1200, 1000)).save(folder / "bomb.png")
    photo.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(np.full((60, 90), 40_000, np.uint16)).save(folder / "deep.png")
    photo.convert("RGBA").save(folder / "alpha.png")
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    Image.fromarray(np.ones((40, 40), np.float32)).save(folder / "float.tiff")
    for command, result in (("infer", "results.jsonl"), ("encode", "index.jsonl")):
        output = tmp_path / command
        options = ("--prompt", "?") if command == "infer" else ()
        done = call(command, folder, output, *options, "--max-image-pixels", "3500000")
        assert done.status == 3, done.output
        errors = {row["id"]: row["error"] for row in rows_of(output / result) if row.get("error")}
        # Older releases refuse an image of one pixel, newer ones scale it up.
        assert errors.keys() - {"dot.png"} == {
            "cut.jpg",
            "empty.png",
            "text.jpg",
            "wider.png",
            "float.tiff",
        }
        assert all(name in error for name, error in errors.items())
        assert "truncated" in errors["cut.jpg"]
        assert "Expected an image file that Pillow opens" in errors["text.jpg"]
        assert "aspect ratio must be smaller than 200" in errors["wider.png"]
        assert "floating point" in errors["float.tiff"]
        assert f"{len(errors)} failed, 0 left" in done.output
        small = call(command, folder, tmp_path / f"{command}2", *options, "--max-image-pixels", "1000000")
        errors = {
            row["id"]: row["error"] for row in rows_of(tmp_path / f"{command}2" / result) if row.get("error")
        }
        assert small.status == 3 and "decompression bomb" in errors["bomb.png"]


def corner(image: Image.Image) -> tuple[int, ...]:
    pixel = image.getpixel((0, 0))
    assert isinstance(pixel, tuple)
    return pixel


def test_colours_and_depth(tmp_path: Path) -> None:
    """16 bits are scaled, alpha lies on white, CMYK and palettes become RGB, cameras' turns are made."""
    deep = tmp_path / "deep.png"
    Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16)).save(deep)
    assert np.asarray(decode(str(deep)))[0, :, 0].tolist() == [0, 100, 255]
    for mode in ("RGBA", "LA", "P"):
        image = Image.new("RGBA", (4, 4), (10, 10, 10, 0))
        clear = tmp_path / f"{mode}.png"
        if mode == "P":
            palette = Image.new("P", (4, 4), 3)
            palette.putpalette([7] * 768)
            palette.save(clear, transparency=3)
        else:
            image.convert(mode).save(clear)
        assert corner(decode(str(clear))) == (255, 255, 255), mode
    cmyk = tmp_path / "cmyk.tiff"
    Image.new("CMYK", (4, 4), (255, 0, 255, 0)).save(cmyk)
    red, green, blue = corner(decode(str(cmyk)))
    assert green > red and green > blue
    turned = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 10)).save(turned, exif=exif)
    assert decode(str(turned)).size == (10, 30)


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    Image.new("1", (20_000, 10_000)).save(path)
    with pytest.raises(ImageError, match="decompression bomb"):
        decode(str(path))
    assert decode(str(path), 200_000_000).size == (20_000, 10_000)
    assert Image.MAX_IMAGE_PIXELS == 89478485  # ours alone was raised


@pytest.mark.parametrize("limit", [1, 2, 3, 8, 9])
def test_the_limit_of_pixels_is_exact(limit: int, tmp_path: Path) -> None:
    path = str(tmp_path / "row.png")
    Image.new("RGB", (limit, 1)).save(path)
    assert decode(path, limit).width == limit
    Image.new("RGB", (limit + 1, 1)).save(path)
    with pytest.raises(ImageError, match="decompression bomb"):
        decode(path, limit)


LINES = {
    "no JSON": ("{", "line 2: .*expected a JSON object"),
    "no object": ("[1]", "line 2: list; expected an object"),
    "unknown key": ('{"img": "a.png", "prompt": "?"}', "line 2: unknown keys img; known are id, image"),
    "no prompt": ('{"image": "a.png"}', "line 2: prompt is None; expected text, there or by --prompt"),
    "both": ('{"image": "a", "images": ["b"], "prompt": "?"}', "has both image and images"),
    "no path": ('{"image": 3, "prompt": "?"}', r"images are \[3\]; expected paths"),
    "same id": ('{"id": "1", "prompt": "?"}', "line 2: id '1' is that of line 1 too"),
    "bad id": ('{"id": [], "prompt": "?"}', r"id is \[\]; expected text or an integer"),
}


@pytest.mark.parametrize(("line", "message"), LINES.values(), ids=LINES)
def test_unusable_lines(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "work.jsonl"
    path.write_text('{"id": 1, "prompt": "?"}\n' + line + "\n")
    with pytest.raises(JobError, match=message):
        read_source(path, None, prompts=True)
    done = call("infer", path, tmp_path / "out")
    assert done.status == 2
    assert not (tmp_path / "out").exists()


def test_nothing_to_do(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    done = call("infer", empty, tmp_path / "out", "--prompt", "?")
    assert done.status == 2 and "holds no items" in done.output
    (empty / "a.txt").write_text("")
    done = call("encode", empty, tmp_path / "out")
    assert done.status == 2 and "1 files in it have no suffix of an image" in done.output
    done = call("encode", tmp_path / "nowhere", tmp_path / "out")
    assert done.status == 2 and "does not exist" in done.output
    (tmp_path / "none.jsonl").write_text("\n")
    assert call("infer", tmp_path / "none.jsonl", tmp_path / "out").status == 2
    (tmp_path / "bytes.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    done = call("infer", tmp_path / "bytes.jsonl", tmp_path / "out")
    assert done.status == 2 and "not UTF-8" in done.output
    assert call("infer", photographs(tmp_path / "in", 1), tmp_path / "out").status == 2  # no prompt
    assert not (tmp_path / "out").exists()


def test_unusable_settings(tmp_path: Path) -> None:
    folder = photographs(tmp_path / "in", 1)
    for options, message in (
        (("--dtype", "int8"), "unknown dtype 'int8'; known: float32"),
        (("--format", "csv"), "unknown format 'csv'"),
        (("--attn", "nonsense"), "unknown attn 'nonsense'; known: varlen"),
        (("--optimize", "nonsense"), "unknown optimize 'nonsense'"),
        (("--resume", "--overwrite"), "give one of them"),
        (("--compare", "sdpa,sdpa"), "expected different paths"),
        (("--compare", "sdpa,varlen", "--resume"), "--resume does not go with it"),
    ):
        done = call("infer", folder, tmp_path / "out", "--prompt", "?", *options)
        assert done.status == 2 and message in done.output, done.output


def test_names_that_are_no_unicode(tmp_path: Path) -> None:
    folder = photographs(tmp_path / "in", 1)
    name = b"\xff\xfe.png".decode("utf-8", "surrogateescape")
    Image.new("RGB", (60, 60)).save(folder / name)
    assert call("encode", folder, tmp_path / "out").status == 0
    assert name in [row["id"] for row in rows_of(tmp_path / "out" / "index.jsonl")]


@pytest.mark.parametrize("kind", ["table", "parquet"])
def test_names_that_are_no_unicode_in_tables(kind: str, tmp_path: Path) -> None:
    """Arrow holds UTF-8 only; also where a table is written once more without another process's items."""
    folder, output = pictures(tmp_path / "in", 3), tmp_path / "out"
    os.rename(os.fsencode(folder / "00.png"), os.fsencode(folder) + b"/caf\xe9.png")
    assert do(Fake(kind), folder, output).finished
    names = {"01.png", "caf\\udce9.png"}
    if kind == "table":  # with the item that failed
        names.add("02.png")
    assert {row["id"] for row in table_of(output)} == names
    for shard in (output / "shards").iterdir():
        Parquet({"id": "string"}).drop(shard, ["caf\udce9.png"])
    assert [row["id"] for row in table_of(output)] == ["caf\\udce9.png"]


def test_ids_that_meet_when_lines_are_taken_apart(tmp_path: Path) -> None:
    path = tmp_path / "work.jsonl"
    lines = [{"id": "a", "images": ["0.png", "1.png"]}, {"id": "a#1", "image": "2.png"}]
    for given in (lines, lines[::-1]):
        path.write_text("\n".join(map(json.dumps, given)))
        with pytest.raises(JobError, match=r"id 'a#1' is that of image . of 'a.*' and of image . of 'a"):
            read_source(path, None, prompts=False)
        assert len(read_source(path, "?", prompts=True).items) == 2


def test_a_prompt_with_image_tokens_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(
        json.dumps({"id": "bad", "prompt": "<|vision_start|><|image_pad|><|vision_end|>"})
        + "\n"
        + json.dumps({"id": "good", "prompt": "What?"})
    )
    done = call("infer", tmp_path / "in.jsonl", tmp_path / "out")
    rows = {row["id"]: row for row in rows_of(tmp_path / "out" / "results.jsonl")}
    assert done.status == 3, done.output
    assert rows["bad"]["error"] and "text" in rows["good"]
