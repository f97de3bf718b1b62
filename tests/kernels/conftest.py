"""Property tests draw the same examples on every run: a failure here is a failure there."""

from hypothesis import settings

settings.register_profile("kernels", deadline=None, derandomize=True, database=None, max_examples=40)
settings.load_profile("kernels")
