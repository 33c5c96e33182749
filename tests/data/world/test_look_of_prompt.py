"""Which look a prompt names."""

from __future__ import annotations

import pytest

from ldm.data.world import LOOKS, draw_clip
from ldm.data.world.captions import DRIVES, look_of_prompt
from ldm.data.world.looks import LOOKS as ALL


@pytest.mark.parametrize("look", LOOKS)
def test_whatever_captions_call_a_look_names_it(look):
    prompts = [f"{start}{phrase} {drive}" for phrase in (look, *ALL[look].phrases) for drive in DRIVES
               for start in ("", "A ")]  # fmt: skip
    assert {look_of_prompt(prompt) for prompt in prompts} == {look}


@pytest.mark.slow
def test_every_caption_names_the_look_of_its_clip():
    for seed, look in enumerate(LOOKS):
        assert [look_of_prompt(caption) for caption in draw_clip(look, seed, 1, 16, 8).captions] == [look] * 4


@pytest.mark.parametrize(
    ("prompt", "look"),
    [
        ("Cyberpunk scenic byway road drive", "cyberpunk"),
        ("neon  CYBERPUNK\nnight road drive", "cyberpunk"),  # not night
        ("volcano fire burning scenic byway road drive", "volcano fire"),
        ("a polar night with aurora", "arctic aurora"),
        ("rain", "rain"),
        ("snow at night", None),  # two
        ("a road through the Netherlands", None),
        ("a training run", None),  # rain is only a part of a word
        ("", None),
    ],
)
def test_prompts_of_people(prompt, look):
    assert look_of_prompt(prompt) == look
