"""Ray Serve applications: they bind `af2_ray.serve` to HTTP and do nothing more."""
