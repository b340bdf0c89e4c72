"""`g2rpo evaluate` of folders of images: where prompts are from, which files are told apart."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_evaluate import g2rpo_, result, rows_of, table

from g2rpo.evaluate.folder import load_image, read_folder
from g2rpo.pictures import write_picture

BRIGHTNESS = """[{"name": "tiny:brightness"}]"""


def level(value: int, size: tuple[int, int] = (6, 4), mode: str = "RGB") -> Image.Image:
    return Image.new(mode, size, (value,) * 3 if mode == "RGB" else value)


def write_images(folder: Path, levels: dict[str, int], **chunks: str) -> Path:
    """Images of one colour; chunks: prompts by the first letters of their names."""
    folder.mkdir()
    for name, value in levels.items():
        prompt = chunks.get(name.partition(".")[0])
        write_picture(level(value), folder / name, {} if prompt is None else {"prompt": prompt})
    return folder


def evaluate(folder: Path, *arguments: object, code: int = 0) -> Path:
    output = folder.parent / "out"
    more = () if "--rewards" in arguments else ("--rewards", BRIGHTNESS)
    g2rpo_("evaluate", folder, "--output", output, "--overwrite", *more, *arguments, code=code)
    return output


def refused(capsys, folder: Path, *arguments: object) -> str:
    capsys.readouterr()
    evaluate(folder, *arguments, code=2)
    return capsys.readouterr().err.removeprefix("g2rpo evaluate: error: ").strip()


def about_prompts(images, prompts):
    """A reward of prompts alone."""
    return torch.tensor([float(len(prompt)) for prompt in prompts])


def test_a_folder_against_another(tmp_path, capsys):
    levels = {"b.png": 0, "a.png": 51, "c.png": 153}
    policy = write_images(tmp_path / "p", levels, a="a fox", b="Füchse, naß", c="a fox")
    base = write_images(tmp_path / "b", dict.fromkeys(levels, 51))
    output = evaluate(policy, "--base", base)
    images = result(output)["images"]
    assert [(image["prompt"], image["file"]) for image in images] == [
        ("a fox", "../p/a.png"), ("Füchse, naß", "../p/b.png"), ("a fox", "../p/c.png"),
    ]  # fmt: skip
    assert [image["base_file"] for image in images] == [f"../b/{n}.png" for n in "abc"]
    row = table(output)["brightness"]
    assert row["change"]["mean"] == pytest.approx((0 - 0.2 + 0.4) / 3, abs=1e-6)
    assert row["win_rate"]["mean"] == pytest.approx((0.5 + 0 + 1) / 3)
    # the two of one prompt differ by .4: a standard deviation of .2 * sqrt(2)
    spread = result(output)["diversity"]
    assert spread["policy"] == pytest.approx(0.2 * math.sqrt(2), abs=1e-6) and spread["base"] == 0
    said = capsys.readouterr().out
    assert "Diversity within a prompt: 0.000 -> 0.283" in said
    assert "in-domain" not in said and "failed" not in said and str(output) in said
    page = (output / "evaluation.html").read_text(encoding="utf-8")
    assert "brightness" in page and (output / "../p/a.png").is_file()


def test_alone_there_is_no_change_and_marks_are_those_of_the_rewards(tmp_path, capsys):
    folder = write_images(tmp_path / "p", {"a.png": 51, "b.png": 102}, a="x", b="y")
    rewards = """[{"name": "tiny:brightness"}, {"name": "tiny:contrast", "heldout": true}]"""
    output = evaluate(folder, "--rewards", rewards)
    row = table(output)["brightness"]
    assert row["policy"]["mean"] == pytest.approx(0.3) and row["base"] is row["change"] is None
    assert [r["mark"] for r in table(output).values()] == ["in-domain", "held-out"]
    said = capsys.readouterr().out
    assert "win rate" not in said and "base" not in said and "Diversity" not in said
    assert rows_of(output / "scores.csv")[1]["base_file"] == ""
    evaluate(folder, "--samples", 1)
    assert [image["prompt"] for image in result(output)["images"]] == ["x"]


@pytest.mark.parametrize("source", ["file", "metadata", "text", "chunk"])
def test_prompts_by_precedence(source, tmp_path):
    """A file that is named, then metadata.jsonl, then the files' own."""
    folder = write_images(tmp_path / "p", {"a.png": 1, "b.png": 2}, a="aaaa", b="bbbbb")
    rewards = ("--rewards", """[{"name": "test_evaluate_images:about_prompts"}]""")
    expected, more = [4.0, 5.0], ()
    if source != "chunk":
        key = "prompt" if source != "text" else "text"
        line = json.dumps({"file_name": "b.png", key: "b"})
        (folder / "metadata.jsonl").write_text(f"{line}\n\n")
        expected = [4.0, 1.0]  # what it does not list has its own
    if source == "file":
        (tmp_path / "prompts.txt").write_text("first one\nsecond\n")
        expected, more = [9.0, 6.0], ("--data.prompts", tmp_path / "prompts.txt")
    output = evaluate(folder, *rewards, *more)
    assert [image["scores"]["about_prompts"] for image in result(output)["images"]] == expected


def test_prompts_that_are_not_there(tmp_path, capsys):
    folder = write_images(tmp_path / "p", {"a.png": 1, "b.png": 2, "c.png": 3}, a="x")
    said = refused(capsys, folder)
    assert said.startswith(f"{folder / 'b.png'} has no prompt; expected --data.prompts FILE")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo\n")
    said = refused(capsys, folder, "--data.prompts", prompts)
    assert "which holds 2 different prompts; expected one an image, in the order of" in said
    line = said[said.index('{"file_name"') :]  # can be copied
    assert json.loads(line) == {"file_name": "a.png", "prompt": "one"}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"file_name": "z.png", "text": "x"}', "line 1: file_name is 'z.png'; expected an image"),
        ('{"file_name": "a.png"}', "line 1: prompt or text is None; expected the prompt of a.png"),
        ('{"file_name": "a.png", "prompt": 3}', "line 1: prompt or text is 3"),
        ('["a.png"]', "line 1: expected a JSON object, found"),
        ("{", "line 1: expected a JSON object"),
        ('{"file_name":"a.png","text":"x"}\n' * 2, "line 2: file_name is 'a.png', as in an"),
    ],
)
def test_metadata_that_is_wrong(line, expected, tmp_path, capsys):
    folder = write_images(tmp_path / "p", {"a.png": 1})
    (folder / "metadata.jsonl").write_text(line)
    assert f"metadata.jsonl, {expected}" in refused(capsys, folder)


def test_pairs_that_are_none(tmp_path, capsys):
    policy = write_images(tmp_path / "p", {"a.png": 1, "b.png": 2}, a="x", b="y")
    base = write_images(tmp_path / "b", {"a.png": 1, "c.png": 2, "d.png": 3})
    said = refused(capsys, policy, "--base", base)
    assert "1 of the 2 images have no partner of their name and 2 of its 3 are no partners" in said
    assert "the first 'b.png'" in said
    other = write_images(tmp_path / "o", {"a.png": 1, "b.png": 2}, b="z")
    said = refused(capsys, policy, "--base", other)
    assert "whose b.png is of the prompt 'z'; expected 'y', as of its partner" in said
    assert "--base is" in refused(capsys, policy, "--base", tmp_path / "nowhere")
    assert "--samples is 3; expected at most 2" in refused(capsys, policy, "--samples", 3)


def test_images_of_several_sizes_keep_their_order(tmp_path, monkeypatch):
    from g2rpo.evaluate import of_images

    monkeypatch.setattr(of_images, "CHUNK_BYTES", 2 * 4 * 3 * 24)  # two of the smaller ones
    folder = tmp_path / "p"
    folder.mkdir()
    sizes = [(6, 4), (8, 8), (6, 4), (4, 6), (6, 4)]
    for i, side in enumerate(sizes):
        write_picture(level(51 * i, side), folder / f"{i}.png", {"prompt": f"p{i}"})
    output = evaluate(folder, "--rollout.branch_batch", 3)
    found = [image["scores"]["brightness"] for image in result(output)["images"]]
    assert found == pytest.approx([0.2 * i for i in range(5)])


def test_what_files_hold_is_scored_as_a_viewer_shows_it(tmp_path):
    rows = np.zeros((4, 6, 3), np.uint8)
    rows[0] = 255  # bright above
    upright, turned = Image.fromarray(rows), Image.Exif()
    turned[0x0112] = 6  # shown after a quarter turn to the right
    folder = tmp_path / "p"
    folder.mkdir()
    upright.save(folder / "a.png")
    upright.transpose(Image.Transpose.ROTATE_90).save(folder / "b.png", exif=turned)
    upright.save(folder / "c.webp", lossless=True)
    upright.quantize(4).save(folder / "d.png")
    upright.convert("RGBA").save(folder / "e.png")  # opaque
    level(128, mode="L").save(folder / "f.jpeg")
    Image.fromarray(np.full((4, 6), 32896, np.uint16)).save(folder / "g.png")
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "notes.txt").write_bytes(b"")
    found = read_folder(folder, "IMAGES_DIR", "prompt")
    assert found.names == [
        "a.png", "b.png", "c.webp", "d.png", "e.png", "f.jpeg", "g.png",
    ]  # fmt: skip
    assert not found.grey and found.sizes == [(4, 6)] * 7
    first = load_image(found.files[0], grey=False)
    assert first.shape == (3, 4, 6) and first[:, 0].min() == 1 and first[:, 1:].max() == 0
    for file in found.files[1:5]:
        assert torch.equal(load_image(file, grey=False), first), file
    eight, sixteen = (load_image(file, grey=True) for file in found.files[5:])
    assert eight.shape == sixteen.shape == (1, 4, 6)
    torch.testing.assert_close(eight, torch.full_like(eight, 128 / 255))
    torch.testing.assert_close(sixteen, torch.full_like(eight, 32896 / 65535))
    assert load_image(found.files[6], grey=False).shape == (3, 4, 6)


def channels(images, prompts):
    return torch.full((len(images),), float(images.shape[1]))


@pytest.mark.parametrize("mixed", [False, True])
def test_grey_images_have_one_channel_if_all_are_grey(mixed, tmp_path):
    folder = write_images(tmp_path / "p", {}, a="x")
    for i in range(2):
        write_picture(level(9, mode="L"), folder / f"{i}.png", {"prompt": "x"})
    if mixed:
        write_picture(level(9), folder / "2.png", {"prompt": "x"})
    output = evaluate(folder, "--rewards", """[{"name": "test_evaluate_images:channels"}]""")
    assert table(output)["channels"]["policy"]["mean"] == (3 if mixed else 1)


def translucent(path: Path) -> None:
    picture = level(9).convert("RGBA")
    picture.putpixel((0, 0), (9, 9, 9, 128))
    picture.save(path)


def cut(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:3000])


def animated(path: Path) -> None:
    level(1).save(path, save_all=True, append_images=[level(2)])


@pytest.mark.parametrize(
    ("write", "expected"),
    [
        (translucent, "is transparent in places; expected an opaque image"),
        (cut, "cannot be read: "),
        (lambda path: path.write_bytes(b"no image"), "cannot be read: cannot identify image"),
        (animated, "holds 2 frames; expected a single image"),
        (lambda path: level(9).convert("LAB").save(path, "TIFF"), "has the mode 'LAB'; expected"),
    ],
    ids=["transparent", "cut", "no image", "animated", "colours"],
)
def test_a_file_that_is_no_plain_image_is_named(write, expected, tmp_path, capsys):
    folder = write_images(tmp_path / "p", {"a.png": 1}, a="x")
    write(folder / "b.png")
    assert refused(capsys, folder).startswith(f"{folder / 'b.png'} {expected}")
