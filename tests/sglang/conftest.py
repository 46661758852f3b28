"""`make test-sglang` runs these in an environment of their own; elsewhere there is no SGLang."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("sglang") else ["test_*.py"]
