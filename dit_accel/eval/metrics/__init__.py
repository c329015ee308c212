"""What is measured of sample sets."""
