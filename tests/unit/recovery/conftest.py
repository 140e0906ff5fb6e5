"""Shapes of the recovery room are checked at each call."""

from __future__ import annotations

import jaxtyping

jaxtyping.install_import_hook(["besa_exp.recovery"], "beartype.beartype")
