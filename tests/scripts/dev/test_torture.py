"""Three kills of a tiny run and of a tiny preparation; `scripts/dev/torture.py --kills 20` is the long form."""

from __future__ import annotations

import pytest

from ldm.errors import UserError
from scripts.dev import torture
from scripts.dev.torture import leaves, main, unlike


@pytest.mark.slow
def test_three_kills_leave_no_trace(tmp_path, capsys):
    main(["--kills", "3", "--work", str(tmp_path), "--workers", "0"])
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == "3 of 3 identical"
    for phase in ("step", "checkpoint", "renaming", "encoding", "shards", "index"):
        assert f"│ {phase} " in printed


def test_differences_are_found(tmp_path, capsys, monkeypatch):
    class Part:
        def straight(self):
            pass

        def killed(self, death):
            return "step", "step 3", None

        def finish(self):
            return unlike("logged", {("val/loss", 3, 0): 1.0}, {})

    console = torture.Console()
    assert torture.torture(Part(), "training", torture.deaths(torture.TRAINING, 4, 0), console) == [False] * 4
    assert "logged: ('val/loss', 3, 0) is missing" in " ".join(capsys.readouterr().out.split())
    assert unlike("x", {"a": 1}, {"a": 2}) == "x: a is another one"
    assert unlike("x", {}, {"a": 2}) == "x: a is too much"


def test_all_values_are_compared():
    torch = torture.torch
    one = {"config": 1, "a": [torch.zeros(2), {"b": 3}], "between_steps": {"logs": {"x": 1}, "logged_steps": 4}}
    places = dict(leaves(one))
    assert set(places) == {"a.0", "a.1.b", "between_steps.logged_steps"}
    other = {**one, "a": [torch.tensor([0.0, -0.0]), {"b": 3}]}
    assert unlike("c", places, dict(leaves(other))) == "c: a.0 is another one"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--kills", "0"], "--kills: expected at least 1, found 0"),
        (["--work", "."], "--work: expected an empty folder"),
    ],
)
def test_invalid_arguments_are_errors(words, message):
    with pytest.raises(UserError, match=message):
        main(words)
