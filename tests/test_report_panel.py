"""One image with its kept patches: brightness, colours of turns, numbers, and the text around it."""

from __future__ import annotations

from PIL import Image

from vlm_pruner_eval.report.geometry.views import View
from vlm_pruner_eval.report.show.panel import BORDER, DIMMED, font, panel, turn_colour, wrapped

VIEW = View(
    "",
    0,
    0,
    (0.0, -20.0, 80.0, 60.0),
    {row * 4 + col: (20 * col, 20 * row - 20, 20 * col + 20, 20 * row) for row in range(4) for col in range(4)},
)


def test_kept_patches_stay_bright_in_a_frame_of_their_turns_colour() -> None:
    drawn = panel(Image.new("RGB", (80, 40), "white"), (80, 40), VIEW, {5: 0, 10: 1}, 2, 400)
    assert drawn.size == (400, 400)
    dim = int(255 * DIMMED)
    assert drawn.getpixel((110, 110)) == drawn.getpixel((290, 290)) == (255, 255, 255)  # corners of cells 5 and 10, inside their frames
    assert drawn.getpixel((150, 250)) == drawn.getpixel((350, 150)) == (dim, dim, dim)
    assert drawn.getpixel((100, 100)) == turn_colour(0, 2) and drawn.getpixel((200, 200)) == turn_colour(1, 2)
    assert drawn.getpixel((350, 50)) == tuple(int(value * DIMMED) for value in BORDER)  # padding, dropped
    numbers = drawn.crop((120, 120, 180, 180)).convert("L")
    assert numbers.getextrema()[0] < 30, "the turn is written in the cell"


def test_without_ranks_the_image_is_left_as_it_is_and_a_cropped_part_is_lined_off() -> None:
    cropped = View("", 0, 0, (0.0, 0.0, 100.0, 50.0), {0: (25.0, 0.0, 75.0, 50.0)})
    drawn = panel(Image.new("RGB", (100, 50), "blue"), (100, 50), cropped, None, 1, 200)
    found = {drawn.getpixel((x, 50)) for x in range(200)}
    assert found == {(0, 0, 255), (235, 235, 235)}
    assert [x for x in range(200) if drawn.getpixel((x, 50)) != (0, 0, 255)] == [50, 149]


def test_colours_of_turns_differ_and_are_brighter_than_what_is_dropped() -> None:
    colours = [turn_colour(rank, 64) for rank in range(64)]
    assert len(set(colours)) == 64 and min(max(colour) for colour in colours) > 255 * DIMMED + 60


def test_long_text_is_cut_in_lines_that_fit() -> None:
    letters = font(15)
    lines = wrapped("a question of many words " * 20 + "x" * 200, letters, 200, 4)
    assert len(lines) == 4 and lines[-1].endswith(" …")
    assert all(letters.getlength(line) <= 200 for line in lines)
    assert len(wrapped("x" * 200, letters, 200, 99)) > 5
    assert wrapped("two\nlines", letters, 200, 4) == ["two", "lines"]
