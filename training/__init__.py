"""How any of the scripts trains: options, run folder, checkpoints, devices."""
