"""Training runs of the toy model by the command itself, in the process of a test."""

from __future__ import annotations

import torch

import main as command


def run(toy, *arguments):
    """Train by the config `toy`, logs beside it; returns the run folder, None where none was made."""
    logs = toy.parent / "logs"
    before = set(logs.glob("*"))
    command.main([*arguments, "-l", str(logs)])
    return next(iter(set(logs.glob("*")) - before), None)


def last(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
