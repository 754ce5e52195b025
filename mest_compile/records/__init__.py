"""What was measured: one trial, and logs of them."""
