"""The curves of a training, read from Lightning's table."""

from __future__ import annotations

from lightning_revlib.recipes.display.curves import read_curves

TABLE = """\
epoch,test/acc,train/acc,val/acc
0,,0.25,
0,,,0.2
1,,0.75,
1,,,0.4
2,,,0.4
2,0.5,,
"""


def test_no_stage_goes_on_after_the_last_epoch_that_was_trained(tmp_path):
    """The best checkpoint is validated and tested after the training, in an epoch that Lightning counts as the next."""
    (tmp_path / "metrics.csv").write_text(TABLE)
    assert read_curves(tmp_path / "metrics.csv") == {
        "acc": {"train": [(0, 0.25), (1, 0.75)], "val": [(0, 0.2), (1, 0.4)], "test": [(1, 0.5)]}
    }
