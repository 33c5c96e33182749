"""One seed from several numbers, so that a draw depends on what it is for and not on what was drawn before it."""

from __future__ import annotations


def mixed(seed: int, stream: int, position: int) -> int:
    """One 63-bit seed from three numbers, far apart for near ones (the finaliser of splitmix64, Steele et al. 2014)."""
    mix = (seed * 0x9E3779B97F4A7C15 + stream * 0xD1B54A32D192ED03 + position) & 0xFFFFFFFFFFFFFFFF
    for multiplier, shift in ((0xBF58476D1CE4E5B9, 30), (0x94D049BB133111EB, 27)):
        mix = ((mix ^ (mix >> shift)) * multiplier) & 0xFFFFFFFFFFFFFFFF
    return (mix ^ (mix >> 31)) >> 1
