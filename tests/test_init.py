"""The package's names, which are imported when they are used."""

from __future__ import annotations

import subprocess
import sys


def test_names_are_imported_when_they_are_used():
    code = (
        "import sys, lightning_revlib as revlib; assert 'torch' not in sys.modules\n"
        "assert not hasattr(revlib, 'no_such_name') and revlib.nn.swap is revlib.swap\n"
        "assert {'swap', 'ReversibleStrategy'} < {*dir(revlib)} and 'lightning' not in sys.modules\n"
        "from lightning_revlib import *; assert ReversibleStrategy is revlib.ReversibleStrategy"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
