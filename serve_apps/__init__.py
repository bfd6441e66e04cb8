"""Ray Serve applications: they bind `af2_ray.engine` to HTTP and do nothing more."""

import os

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # "Loading weights" bars in the logs of server and replicas
