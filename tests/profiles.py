"""How many random cases a property meets: the same in every run, or many new ones in a search."""

import os

from hypothesis import settings

settings.register_profile("ci", derandomize=True, deadline=None, database=None)
settings.register_profile("search", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def examples(count: int) -> settings:
    """`count` cases of this property in `ci`; 20 times as many in `search`."""
    return settings(max_examples=count * settings().max_examples // 100)
