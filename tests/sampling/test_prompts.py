"""Prompt schedules (`ldm/sampling/prompts.py`): what is one, what each frame sees, and what is refused."""

from __future__ import annotations

import pytest
import torch

from ldm.errors import UserError
from ldm.sampling.prompts import odd_part, prompts_in, read_schedule


def test_prompts_take_over_at_their_frames_and_blend_between():
    schedule = read_schedule("0: dawn road |4:night road| 6 : fog: thick ", 8)
    assert schedule.prompts == ("dawn road", "night road", "fog: thick")
    expected = [[1, 0, 0], [0.75, 0.25, 0], [0.5, 0.5, 0], [0.25, 0.75, 0], [0, 1, 0], [0, 0.5, 0.5], [0, 0, 1],
                [0, 0, 1]]  # fmt: skip
    assert schedule.shares(range(8)).tolist() == expected
    embeddings = {prompt: torch.randn(1, 3, 5) for prompt in schedule.prompts}
    context = schedule.context(embeddings, [4, 1, 7])
    assert context.shape == (3, 3, 5)
    assert torch.equal(context[0], embeddings["night road"][0])
    torch.testing.assert_close(context[1], (0.75 * embeddings["dawn road"] + 0.25 * embeddings["night road"])[0])
    assert torch.equal(context[2], embeddings["fog: thick"][0])


def test_one_part_from_frame_0_is_a_schedule_of_one_prompt():
    assert prompts_in("0: a road", 5) == ("a road",)
    assert read_schedule("0:", 5).prompts == ("",)
    assert read_schedule("\x1d00: dawn", 5).prompts == ("dawn",)  # a space to strip, but not to int


@pytest.mark.parametrize(
    "prompt",
    ["", "a road", "2001: a space odyssey", "a road: wet | dry", "rain | fog", "0: dawn | night", "-1: a | 3: b", "|",
     "0.5: a | 3: b"],
)  # fmt: skip
def test_what_has_not_the_form_is_a_plain_prompt(prompt):
    assert read_schedule(prompt, 5) is None
    assert prompts_in(prompt, 5) == (prompt,)


def test_what_keeps_a_prompt_from_being_a_schedule_is_named():
    assert odd_part("0: dawn | 40 night") == "40 night"
    assert odd_part("0: dawn | 4: night") is None
    assert odd_part("rain | fog") is None
    assert odd_part("2001: a space odyssey") is None


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("3: a | 4: b", "expected the first prompt at frame 0, as in '0: dawn road .*found frame 3"),
        ("0: a | 4: b | 2: c", "expected increasing frames, found 2 after 4; reorder them"),
        ("0: a | 4: b | 4: c", "expected one prompt per frame, found two for frame 4"),
        ("0: a | 0: b", "expected one prompt per frame, found two for frame 0"),
        ("0: a | 5: b", "expected frames 0 to 4 of the clip, found 5; set more --frames"),
        ("0: a | 999999999999999999: b", "expected frames 0 to 4 of the clip"),
    ],
)
def test_bad_schedules_get_one_message(prompt, message):
    with pytest.raises(UserError, match=f"prompt schedule: {message}"):
        read_schedule(prompt, 5)
