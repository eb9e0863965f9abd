"""Running jobs: one here and now, or a queue of them."""
