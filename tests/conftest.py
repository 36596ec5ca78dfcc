"""Settings of all tests."""

from __future__ import annotations

from hypothesis import settings

# machines are shared: how long an example takes says nothing about the code
settings.register_profile("explore", deadline=None)
# every run judges by the same examples; `pytest --hypothesis-profile explore` seeks new ones
settings.register_profile("compress", deadline=None, derandomize=True)
settings.load_profile("compress")
