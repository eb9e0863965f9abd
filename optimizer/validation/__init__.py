"""Whether criteria predict harm: predicted risk against what actions were measured to do on held-out samples."""
