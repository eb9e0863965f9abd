"""What is measured about every decoder layer on the calibration split, and the table that criteria read."""
