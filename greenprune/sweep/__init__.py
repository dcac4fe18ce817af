"""Many runs as one: a sweep's runs are expanded, done here or by Slurm, watched, and reported beside dense twins."""
