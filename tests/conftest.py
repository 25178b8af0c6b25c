"""Settings for all tests."""

import os

from hypothesis import settings

# A shared machine makes any single example slow now and then: no deadline. In CI the examples
# are the same in every run, so that a failure there is about the change.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")
