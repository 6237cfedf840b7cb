"""An extension of griffe: examples of docstrings, which begin with `>>>`, are code on the site."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Put each run of lines from `>>>` to the next empty line between fences."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Change the docstring of an object that has been loaded."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(
                r"^( *)(>>> .*(?:\n *\S.*)*)", r"\1```pycon\n\1\2\n\1```", obj.docstring.value, flags=re.MULTILINE
            )
