"""A problem, a target and knobs become text, the text becomes code, once."""
