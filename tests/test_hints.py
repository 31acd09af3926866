"""Pictures as evidence: what each kind says of a pixel, on the command line too."""

import math
from functools import partial

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_cli import checkpoint, points, run  # noqa: F401

from gmflow_core.hints import KINDS, hint, hue, in_colour, small_picture

RED = torch.tensor([1.0, -1.0, -1.0])


def log_likelihood(evidence, x):
    """Of one pixel x (3,), up to a constant, of the evidence's first pixel."""
    factor = evidence.factor(None)
    matrix, shift = factor.matrix()[0, :, :, 0, 0], factor.shift[0, :, 0, 0]
    return float(shift @ x - 0.5 * x @ matrix @ x)


def picture(colour, b=1):
    return colour.reshape(1, 3, 1, 1).expand(b, 3, 2, 2)


ONE = torch.ones(1, 1, 2, 2)


def test_each_kind_knows_what_it_says_and_no_more():
    """Differences of log likelihoods, by hand: -(distance)^2 / 2 std^2."""
    x = torch.tensor([0.2, -0.5, -0.9])
    at = {kind: partial(log_likelihood, hint(picture(RED), ONE, kind, 0.5)) for kind in KINDS}
    black, dark_red = -torch.ones(3), torch.tensor([-0.4, -1.0, -1.0])
    assert at["colour"](RED) - at["colour"](x) == pytest.approx(2 * float((x - RED).square().sum()), rel=1e-4)
    assert at["brightness"](RED) - at["brightness"](x) == pytest.approx(2 * float(x.mean() - RED.mean()) ** 2, rel=1e-3)
    assert at["hue"](RED) == pytest.approx(at["hue"](dark_red), abs=1e-4) == pytest.approx(at["hue"](black), abs=1e-4)
    assert at["hue"](RED) - at["hue"](x) == pytest.approx(2 * (0.5**2 + 0.1**2), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_grey_values_of_a_mask_scale_the_precision(kind):
    half = hint(picture(RED), 0.5 * ONE, kind, 0.5).factor(None)
    full = hint(picture(RED), ONE, kind, 0.5).factor(None)
    torch.testing.assert_close(half.matrix(), 0.5 * full.matrix())
    torch.testing.assert_close(half.shift, 0.5 * full.shift)


def test_pixels_without_colour_have_no_hue():
    image = picture(RED).clone()
    image[..., 1, 1] = 0.3
    factor = hue(image, torch.ones(1, 1, 2, 2)).factor(None)
    assert factor.matrix()[..., 1, 1].abs().max() < 1e-6
    assert factor.matrix()[..., 0, 0].diagonal(dim1=1, dim2=2).sum() > 1.9


def test_one_colour_for_a_whole_image_is_its_hue():
    got, expected = (in_colour(0.4 * RED - 0.6, (2, 2), 0.5, "it").factor(None),
                     hint(picture(RED), ONE, "hue", 0.5).factor(None))
    torch.testing.assert_close(got.matrix(), expected.matrix())


def test_a_colour_may_be_asked_for_at_some_pixels():
    """A hue as much as the mask says; grey, which is no hue, as a colour."""
    mask = torch.tensor([[0.0, 0.5], [1.0, 0.25]]).reshape(1, 1, 2, 2)
    got = in_colour(0.4 * RED - 0.6, (2, 2), 0.5, "it", mask).factor(None)
    torch.testing.assert_close(got.matrix(), hint(picture(RED), ONE, "hue", 0.5).factor(None).matrix() * mask[:, 0])
    grey = in_colour(torch.full((3,), 0.2), (2, 2), 0.5, "it", mask)
    expected = torch.eye(3).reshape(1, 3, 3, 1, 1) * mask[:, :, None] / 0.5**2
    torch.testing.assert_close(grey.factor(None).matrix(), expected)


@pytest.mark.parametrize("make, message", [
    (lambda: hint(picture(RED), ONE, "shape", 0.5), "kind must be one of colour, hue, brightness"),
    (lambda: hint(picture(RED), ONE, "colour", 0.0), "std must be a number > 0, got 0.0"),
    (lambda: hint(picture(RED), ONE, "colour", math.nan), "std must be a number > 0, got nan"),
    (lambda: hint(picture(RED), 0 * ONE, "colour", 0.5), "nothing is painted"),
    (lambda: hint(picture(torch.zeros(3)), ONE, "hue", 0.5), "has no colour"),
    (lambda: small_picture(picture(RED), (5, 4), 0.1), "2 x 2 pixels"),
    (lambda: small_picture(picture(RED), (4, 8), 0.1), "the same along both sides"),
    (lambda: in_colour(torch.full((3,), 0.2), (2, 2), 0.5, "hypothesis 3"),
     r"hypothesis 3 has no colour.*\(0.60, 0.60, 0.60\)"),
])
def test_bad_hints_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---- the command line ------------------------------------------------------------------------------


def paint(path, size, pixels, background=(0, 0, 0, 0)):
    image = Image.new("RGBA", size, background)
    for place, colour in pixels.items():
        image.putpixel(place, colour)
    image.save(path)
    return path


def test_a_hint_on_the_command_line_is_kept(checkpoint, tmp_path, capsys):  # noqa: F811
    """Where its alpha says so, x first; the other pixels change too, unless nothing propagates."""
    file = paint(tmp_path / "hint.png", (8, 8), {(5, 2): (255, 0, 255, 255)})
    seen = {}
    for name, options in {"none": [], "hint": ["--hint", file],
                          "alone": ["--hint", file, "--no-propagate", "--hint-std", 0.001]}.items():
        code, _, err = run(capsys, "sample", checkpoint, "--labels", "0,1", "--steps", 4, "--latents", "--out",
                           tmp_path / name, *options)
        assert code == 0, err
        seen[name] = load_file(tmp_path / name / "samples.safetensors")["samples"]
    wanted = torch.tensor([1.0, -1.0, 1.0])
    assert (seen["hint"][:, :, 2, 5] - wanted).abs().max() < 0.2 < (seen["none"][:, :, 2, 5] - wanted).abs().max()
    assert (seen["alone"][:, :, 2, 5] - wanted).abs().max() < 0.02


def test_grey_and_small_pictures_on_the_command_line(checkpoint, tmp_path, capsys):  # noqa: F811
    grey = paint(tmp_path / "grey.png", (8, 8), {}, (204, 204, 204, 255))
    small = paint(tmp_path / "small.png", (2, 2), {(0, 0): (255, 255, 255, 255)}, (102, 102, 102, 255))
    code, _, err = run(capsys, "sample", checkpoint, "--count", 2, "--steps", 4, "--latents", "--out", tmp_path / "g",
                       "--grey", grey)
    assert code == 0, err
    x = load_file(tmp_path / "g/samples.safetensors")["samples"]
    assert (x.mean(1) - 0.6).abs().max() < 0.2
    code, _, err = run(capsys, "sample", checkpoint, "--count", 2, "--steps", 4, "--latents", "--out", tmp_path / "s",
                       "--small", small)
    assert code == 0, err
    blocks = load_file(tmp_path / "s/samples.safetensors")["samples"].unflatten(3, (2, 4)).unflatten(2, (2, 4)).mean(
        (3, 5)
    )
    assert (blocks[..., 0, 0] - 1).abs().max() < 0.1 and (blocks[..., 1, :] + 0.2).abs().max() < 0.1


@pytest.mark.parametrize("option, size, pixels, message", [
    ("--hint", (8, 9), {(0, 0): (1, 1, 1, 255)}, "8 x 9 pixels; this model makes 8 x 8"),
    ("--hint", (8, 8), {}, "nothing is painted"),
    ("--small", (3, 3), {}, "whole multiple"),
])
def test_pictures_that_do_not_suit_are_one_line(checkpoint, tmp_path, capsys, option, size,  # noqa: F811
                                                pixels, message):
    file = paint(tmp_path / "x.png", size, pixels)
    code, out, err = run(capsys, "sample", checkpoint, "--labels", "0", "--out", tmp_path / "o", option, file)
    assert code == 2 and message in err and option in err and err.count("\n") == 1


def test_files_and_models_that_have_no_picture_are_one_line(checkpoint, points, tmp_path, capsys):  # noqa: F811
    (tmp_path / "x.png").write_text("no picture")
    code, _, err = run(capsys, "sample", checkpoint, "--labels", "0", "--out", tmp_path / "o", "--grey",
                       tmp_path / "x.png")
    assert code == 2 and "cannot be read as a picture" in err and err.count("\n") == 1
    code, _, err = run(capsys, "sample", points, "--count", "2", "--out", tmp_path / "o", "--hint", tmp_path / "x.png")
    assert code == 2 and "this model makes none" in err and err.count("\n") == 1


@pytest.mark.parametrize("options, message", [
    (["--hint-std", 0.1], "--hint-std is of the picture that --hint names"),
    (["--no-propagate"], "--no-propagate is about --hint"),
    (["--hint", "x.png", "--hint-std", 0], "0.0001"),
    (["--hint", "x.png", "--hint-std", "nan"], "'nan' is not a number"),
])
def test_options_that_say_nothing_are_one_line(checkpoint, tmp_path, capsys, options, message):  # noqa: F811
    code, _, err = run(capsys, "sample", checkpoint, "--labels", "0", "--out", tmp_path / "o", *options)
    assert code == 2 and message in err and err.count("\n") == 1
