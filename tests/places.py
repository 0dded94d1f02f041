"""Where things lie, for tests in any folder."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).parent  # the helper modules (store_cases, ...) are imported from here
ROOT = TESTS.parent
GOLDEN = TESTS / "golden"
